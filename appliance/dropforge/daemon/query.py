"""What the jobs are doing, from files alone: works without the daemon, and on a copy of the data root."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dropforge.checkpoints import CheckpointStore
from dropforge.daemon import attempts
from dropforge.daemon.intake import ticket_copy
from dropforge.daemon.liveness import runs_now, serving
from dropforge.daemon.names import printable
from dropforge.daemon.queue import FOLDER_STATE, FOLDERS, Ticket, ids_in, read, state_in, ticket_path
from dropforge.daemon.rejection import rejections
from dropforge.daemon.sequence import number_of
from dropforge.errors import CommandError, Reason
from dropforge.files import read_json
from dropforge.paths import DataRoot, RunFolder
from dropforge.states import State


@dataclass(frozen=True, kw_only=True)
class JobView:
    """One job as people see it."""

    id: str
    name: str
    state: State
    reason: str | None = None
    message: str = ""
    file: str = ""
    """Name under which it was dropped."""
    priority: int = 50
    waiting_for: str = ""
    """Why a queued job does not run yet."""
    accepted: str = ""
    attempt: int = 0
    result: Path | None = None
    """Its result folder, once that exists."""
    status: dict[str, Any] = field(default_factory=dict)
    """status.json as it is: step, total_steps, loss, eta_seconds ..."""

    @property
    def seq(self) -> int:
        return number_of(self.id)


def list_jobs(
    root: DataRoot, *, ended: int | None = None, alive: bool | None = None, queued: bool = True
) -> list[JobView]:
    """Every job in the order of acceptance, rejected files among them.

    Args:
        ended: only so many of the newest ended jobs (None: all).
        alive: whether a daemon serves the root (None: look). Without one, what the files say of running jobs is old.
        queued: also what lies in queue/. The daemon knows those itself, and reading 10,000 of them takes seconds.
    """
    alive = serving(root).alive if alive is None else alive
    waiting = _waiting(root) if queued else {}
    live: list[JobView] = []
    over: list[JobView] = []
    for folder in FOLDERS:
        if not (root.path / folder).is_dir() or (folder == "queue" and not queued):
            continue
        ids = ids_in(root, folder)
        is_live = not FOLDER_STATE[folder].ended
        for job_id in ids if is_live or ended is None else ids[-ended:] if ended else []:
            ticket = read(ticket_path(root, folder, job_id))
            if ticket is not None:
                view = _view(root, folder, ticket, waiting)
                (live if is_live else over).append(view if alive or folder != "running" else _left_alone(root, view))
    if not alive:
        live += _half_accepted(root, {job.id for job in live})
    if root.rejected.is_dir():
        over += _rejected(root, newest=ended)
    over.sort(key=lambda job: job.seq)
    kept = over if ended is None else over[len(over) - min(ended, len(over)) :]
    return sorted([*live, *kept], key=lambda job: job.seq)


def find_job(root: DataRoot, text: str) -> JobView:
    """The job with this id, else the only one whose id starts so, else the newest of this name.

    Raises CommandError: job-unknown, job-ambiguous.
    """
    jobs = list_jobs(root)
    exact = [job for job in jobs if job.id == text]
    if exact:
        return exact[0]
    named = [job for job in jobs if text in (job.name, _slug_in(job.id))]
    if named:
        return named[-1]
    starts = [job for job in jobs if text and (job.id.startswith(text) or str(job.seq) == text)]
    if len(starts) == 1:
        return starts[0]
    if starts:
        raise CommandError(f"{printable(text)!r} fits {len(starts)} jobs", code="job-ambiguous", where=str(root.path),
                           why=", ".join(job.id for job in starts[:5]), fix="write more of the id")  # fmt: skip
    raise CommandError(f"there is no job {printable(text)!r}", code="job-unknown", where=str(root.path),
                       why="no ticket has this id, start of an id, or name",
                       fix="`dropforge status` lists the jobs")  # fmt: skip


def _slug_in(job_id: str) -> str:
    return job_id.partition("-")[2].rpartition("-")[0]


def _view(root: DataRoot, folder: str, ticket: Ticket, waiting: dict[str, str]) -> JobView:
    run = root.run(ticket.id)
    status = read_status(run)
    state = state_of(run, folder, status)
    fits = state.value == status.get("state")
    result = root.result(ticket.slug, ticket.id).path
    return JobView(
        id=ticket.id, name=ticket.name, state=state, reason=status.get("reason") if fits else None,
        message=str(status.get("message", "")) if fits else state.meaning, file=ticket.file, priority=ticket.priority,
        waiting_for=waiting.get(ticket.id, ""), accepted=ticket.accepted, attempt=_whole(status.get("attempt")),
        result=result if result.is_dir() else None, status=status,
    )  # fmt: skip


def _left_alone(root: DataRoot, view: JobView) -> JobView:
    """A job that was running when its daemon went away: its files stay as they were, so they are not repeated here."""
    run = root.run(view.id)
    if runs_now(run):
        text = "Dropforge itself was ended; this job saves a checkpoint and ends, and goes on when Dropforge runs again"
        return replace(view, message=text)
    last = max(attempts.numbers(run), default=0)
    end = attempts.read_end(run, last) if last else None
    if end is not None and end.state is not State.INTERRUPTED:
        return replace(view, state=end.state, reason=end.reason, message="has ended; filed when Dropforge runs again")
    if last and attempts.read_stop(run, last) is Reason.USER:
        return replace(view, message="you asked to stop it; that is finished when Dropforge runs again", status={})
    return replace(view, state=State.INTERRUPTED, reason=None, message=f"was cut off; {_goes_on(run)}", status={})


def _half_accepted(root: DataRoot, known: set[str]) -> list[JobView]:
    """Files that a daemon had taken out of the inbox when it was killed, and has not written a ticket for."""
    views = []
    runs = root.path / "runs"
    for job_id in sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []:
        run = root.run(job_id)
        if job_id in known or run.status.exists():  # the first status.json is written when all is accepted
            continue
        taken = ticket_path(root, "queue", job_id).exists() or run.job_data.is_dir()
        ticket = ticket_copy(run) if taken else None
        if ticket is not None:
            text = "was being accepted; that is finished when Dropforge runs again"
            views.append(JobView(id=job_id, name=ticket.name, state=State.QUEUED, message=text, waiting_for=text,
                                 file=ticket.file, priority=ticket.priority, accepted=ticket.accepted))  # fmt: skip
    return views


def _goes_on(run: RunFolder) -> str:
    """Where an interrupted job will go on, by what lies in its folder."""
    if (run.trained / "record.json").exists():
        return "its training is complete and safe; it goes on with the exports when Dropforge runs again"
    saved = CheckpointStore(run.checkpoints).all() if run.checkpoints.is_dir() else []
    if saved:
        return f"goes on from step {max(point.step for point in saved)}, its last checkpoint, when Dropforge runs again"
    return "starts again from the beginning when Dropforge runs again, because no checkpoint had been saved"


def state_of(run: RunFolder, folder: str, status: dict[str, Any]) -> State:
    """The state as the place of the ticket and status.json say together; the place wins."""
    if folder == "running" and _asked_to_stop(run):
        return State.CANCELLING
    return state_in(folder, status.get("state")) or FOLDER_STATE[folder]


def _asked_to_stop(run: RunFolder) -> bool:
    known = attempts.numbers(run)
    return bool(known) and attempts.read_stop(run, known[-1]) is not None


def read_status(run: RunFolder) -> dict[str, Any]:
    """status.json; empty when there is none that can be read."""
    try:
        value = read_json(run.status)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _waiting(root: DataRoot) -> dict[str, str]:
    try:
        queued = read_json(root.queue_json)["queued"]
        return {job["id"]: job["waiting_for"] for job in queued}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def inbox_of(root: DataRoot) -> list[dict[str, str]]:
    """What the daemon says of files that are not jobs yet: `file`, `stage`, `message`; empty when it says nothing."""
    try:
        entries = read_json(root.queue_json)["inbox"]
        return [{key: str(entry[key]) for key in ("file", "stage", "message")} for entry in entries]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def _rejected(root: DataRoot, *, newest: int | None) -> list[JobView]:
    views = []
    for error in rejections(root, newest=newest):
        problems = error.get("problems") or [{}]
        views.append(JobView(
            id=str(error.get("id", "")), name=str(error.get("file", "")), state=State.REJECTED,
            reason=error.get("reason"), message=str(problems[0].get("what", "")), file=str(error.get("file", "")),
            accepted=str(error.get("time", "")), result=None, status=error,
        ))  # fmt: skip
    return views


def _whole(value: Any) -> int:
    return value if type(value) is int else 0
