"""submit, watch, status, logs, cancel, retry: the queue from the command line. Files only; never imports torch."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dropforge.cli.follow import POLL_SECONDS, exit_status, follow, progress_text
from dropforge.cli.output import data_root, emit, table
from dropforge.cli.spec_commands import read_spec_file
from dropforge.daemon import attempts, control
from dropforge.daemon import submit as inbox
from dropforge.daemon.liveness import NOT_RUNNING, serving
from dropforge.daemon.names import printable
from dropforge.daemon.query import JobView, find_job, inbox_of, list_jobs
from dropforge.daemon.rejection import problem_text
from dropforge.daemon.singleton import daemon_is_alive
from dropforge.daemon.watcher import look
from dropforge.errors import CommandError
from dropforge.files import read_json_lines
from dropforge.paths import DataRoot
from dropforge.settings import settings
from dropforge.spec import Spec
from dropforge.states import State

SHOWN_ENDED_JOBS = 50


def put_into_inbox(root: DataRoot, path: Path) -> Path:
    """Check a spec and drop it, together with the data files that lie beside it. Returns its place in the inbox."""
    if path.is_dir():
        return inbox.submit(root, path)
    _, checked = read_spec_file(path)
    return inbox.submit(root, path, files=data_beside(checked.spec, path.absolute().parent))


def data_beside(spec: Spec, folder: Path) -> dict[str, Path]:
    """Data named in the spec that lies beside it; anything else is looked for in datasets/ by the job."""
    sources = [*spec.data.train, *(spec.data.eval.sources if spec.data.eval else ())]
    names = [source.path for source in sources] + ([spec.imatrix] if spec.imatrix else [])
    return {name: folder / name for name in names if (folder / name).exists()}


def wait_for_id(root: DataRoot, dropped: Path, *, seconds: float) -> JobView:
    """The job made from a dropped file. Raises CommandError when no daemon takes it in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        jobs = [job for job in list_jobs(root, ended=SHOWN_ENDED_JOBS) if job.file == dropped.name]
        if jobs:
            return jobs[-1]
        time.sleep(POLL_SECONDS)
    raise CommandError(
        f"nobody took {dropped.name} within {seconds:g} s",
        code="daemon-absent",
        where=str(root.inbox),
        why="no daemon serves this data root; the file waits in the inbox",
        fix="start one with `dropforge watch`",
    )


def submit(arguments: Namespace) -> int:
    root = data_root(arguments, create=True)
    dropped = put_into_inbox(root, arguments.spec)
    if not arguments.wait:
        emit(arguments, {"file": dropped.name, "inbox": str(root.inbox)}, f"dropped {dropped.name} into {root.inbox}")
        return 0
    job = follow(root, wait_for_id(root, dropped, seconds=60).id)
    emit(arguments, as_json(root, job), describe(root, job))
    return exit_status(job.state)


def status(arguments: Namespace) -> int:
    root = data_root(arguments)
    if arguments.job:
        return _status_of(arguments, root)
    now = serving(root)
    jobs = list_jobs(root, ended=SHOWN_ENDED_JOBS, alive=now.alive)
    asked = {} if now.alive else requests_not_done(root)
    rows = [(job.id, job.state.value, f"{_doing(job)}{asked.get(job.id, '')}") for job in jobs]
    rows += waiting_in_inbox(root, alive=now.alive)
    text = table(rows, header=("JOB", "STATE", "")) if rows else f"no jobs yet; drop a spec into {root.inbox}"
    problems = [f"problem: {problem}" for problem in now.problems]
    emit(arguments, [as_json(root, job) for job in jobs], "\n".join([now.text, *problems, "", text]))
    return 0


def _status_of(arguments: Namespace, root: DataRoot) -> int:
    try:
        job = find_job(root, arguments.job)
    except CommandError as error:
        row = _dropped(root, arguments.job) if error.code == "job-unknown" else None
        if row is None:
            raise
        file, state, message = row
        emit(arguments, {"file": file, "state": state, "message": message}, f"{file} is {state}: it {message}")
        return 0
    emit(arguments, as_json(root, job), describe(root, job))
    return 0


def _dropped(root: DataRoot, text: str) -> tuple[str, str, str] | None:
    """The row of a file called so, with or without its ending, that lies in the inbox and is no job yet."""
    names = sorted(look(root).entries) if root.inbox.is_dir() else []
    found = next((name for name in names if text in (name, Path(name).stem)), None)
    return None if found is None else _inbox_row(found, _said(root, alive=serving(root).alive))


def requests_not_done(root: DataRoot) -> dict[str, str]:
    """Job id to what was asked in control/ while nobody was there to do it."""
    requests = control.pending(root)[0] if root.control.is_dir() else []
    return {item.job_id: f" ({item.action} is asked, and done when Dropforge runs)" for item in requests}


def waiting_in_inbox(root: DataRoot, *, alive: bool) -> list[tuple[str, str, str]]:
    """Rows for files that are not jobs yet."""
    names = sorted(look(root).entries) if root.inbox.is_dir() else []
    said = _said(root, alive=alive)
    rows = [_inbox_row(name, said) for name in names[:SHOWN_ENDED_JOBS]]
    more = len(names) - SHOWN_ENDED_JOBS
    return [*rows, (f"and {more} more", "in inbox", "")] if more > 0 else rows


def _said(root: DataRoot, *, alive: bool) -> dict[str, str] | None:
    """What the daemon says of each file in the inbox; None when there is no daemon."""
    return {entry["file"]: entry["message"] for entry in inbox_of(root)} if alive else None


def _inbox_row(name: str, said: dict[str, str] | None) -> tuple[str, str, str]:
    shown = printable(name)
    if said is None:
        return shown, "in inbox", "becomes a job when Dropforge runs"
    return shown, "in inbox", said.get(shown) or "is about to become a job"


def _doing(job: JobView) -> str:
    if job.state is State.TRAINING:
        return progress_text(job.status)
    if job.state is State.QUEUED:
        return f"waits: {job.waiting_for}" if job.waiting_for else ""
    return f"{job.reason}: {job.message}" if job.reason else job.message


def as_json(root: DataRoot, job: JobView) -> dict[str, Any]:
    """A job for programs: paths relative to the data root."""
    value = asdict(job)
    value["state"] = job.state.value
    value["result"] = str(job.result.relative_to(root.path)) if job.result else None
    return value


def describe(root: DataRoot, job: JobView) -> str:
    """One job for people."""
    rows = [("job", job.id), ("name", job.name), ("state", f"{job.state.value}: {job.state.meaning}")]
    rows += [(label, str(value)) for label, value in (("reason", job.reason), ("message", job.message)) if value]
    rows += [("progress", progress_text(job.status))] if progress_text(job.status) else []
    rows += [("waits for", job.waiting_for)] if job.waiting_for else []
    if job.state is State.REJECTED:
        rows.append(("why", str(root.rejected / job.id / "ERROR.txt")))
    else:
        rows.append(("run", str(root.run(job.id).path)))
    rows += [("result", str(job.result))] if job.result else []
    if not job.state.ended and not serving(root).alive:
        rows.append(("note", NOT_RUNNING))
    problems = job.status.get("problems") or []
    return "\n\n".join([table(rows), *(problem_text(problem) for problem in problems)])


def logs(arguments: Namespace) -> int:
    root = data_root(arguments)
    job = find_job(root, arguments.job)
    run, shown = root.run(job.id), 0
    while True:
        events = list(read_json_lines(run.events))
        for event in events[shown:]:
            details = "  ".join(
                f"{k}={v}" for k, v in event.items() if k not in ("time", "action") and v not in (None, "")
            )
            print(f"{event['time']}  {event['action']:<12} {details}".rstrip(), flush=True)
        shown = len(events)
        if not arguments.follow or find_job(root, job.id).state.ended:
            break
        time.sleep(POLL_SECONDS)
    for line in _log_lines(root, job.id):
        print(line)
    return 0


def _log_lines(root: DataRoot, job_id: str) -> Iterator[str]:
    """The captured output of the newest attempt, with control characters made visible."""
    run = root.run(job_id)
    known = attempts.numbers(run)
    path = run.attempt(known[-1]) / "log.txt" if known else None
    if path is None or not path.exists() or path.stat().st_size == 0:
        return
    yield f"--- output of attempt {known[-1]}"
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            yield "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line.rstrip("\n"))


def cancel(arguments: Namespace) -> int:
    return _ask(arguments, "cancel", "will be stopped")


def retry(arguments: Namespace) -> int:
    return _ask(arguments, "retry", "will run again")


def release(arguments: Namespace) -> int:
    if arguments.trust_code is not None:
        from dropforge.models.code_approval import approve

        root = data_root(arguments)
        run = root.run(find_job(root, arguments.job).id)
        inside = approve(root, run, digits=arguments.trust_code)
        print(
            f"approved, for this and later jobs: code {inside.fingerprint} ({', '.join(inside.modules)})",
            file=sys.stderr,
        )
        if not settings().allow_remote_code:
            print("it runs only where Dropforge was started with DROPFORGE_ALLOW_REMOTE_CODE=1", file=sys.stderr)
    return _ask(arguments, "release", "will go on")


def _ask(arguments: Namespace, action: str, text: str) -> int:
    root = data_root(arguments)
    job = find_job(root, arguments.job)
    control.request(root, job.id, action)
    emit(arguments, {"id": job.id, "asked": action}, f"{job.id} {text}")
    if not daemon_is_alive(root):
        print("no daemon serves this data root yet; it will be done when one starts", file=sys.stderr)
    return 0
