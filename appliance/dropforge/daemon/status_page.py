"""STATUS.md for people and queue.json for programs: the whole data root at a glance, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dropforge.daemon.names import printable
from dropforge.daemon.query import JobView, list_jobs
from dropforge.daemon.queue import Ticket
from dropforge.daemon.scheduler import Waiting
from dropforge.events import utc_now
from dropforge.files import write_text
from dropforge.paths import DataRoot
from dropforge.states import State

QUEUE_LISTED = 1000
"""So many queued jobs, and so many files of the inbox, stand in queue.json; the others are counted."""
_AGE = "Written every few seconds. If that is long ago, Dropforge has ended without a word: ask `dropforge status`."
ENDED_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class InboxEntry:
    """A file that is not a job yet."""

    file: str
    stage: str
    """settling or unfinished."""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything both files show."""

    daemon: str
    """running, paused, draining, stopping or stopped."""
    problems: Sequence[str]
    inbox: Sequence[InboxEntry]
    inbox_more: int = 0
    """So many others lie in the inbox."""
    waiting: Sequence[tuple[Ticket, Waiting]]
    jobs: Sequence[JobView]
    """Running, held and lately ended jobs."""


def write_pages(
    root: DataRoot, *, daemon: str, problems: Sequence[str], inbox: Sequence[InboxEntry], inbox_more: int,
    waiting: Sequence[tuple[Ticket, Waiting]],
) -> None:  # fmt: skip
    jobs = list_jobs(root, ended=ENDED_LISTED, alive=True, queued=False)
    page = Page(daemon=daemon, problems=problems, inbox=inbox, inbox_more=inbox_more, waiting=waiting, jobs=jobs)
    write_text(root.queue_json, _in_lines(as_json(page)))
    write_text(root.status_page, as_markdown(page))


def as_json(page: Page) -> dict[str, Any]:
    """The content of queue.json."""
    listed = page.waiting[:QUEUE_LISTED]
    return {
        "schema": 1,
        "updated": utc_now(),
        "daemon": page.daemon,
        "problems": list(page.problems),
        "inbox": [{"file": e.file, "stage": e.stage, "message": e.message} for e in page.inbox],
        "inbox_more": page.inbox_more,
        "running": [_running(job) for job in page.jobs if not job.state.ended and job.state is not State.HELD],
        "queued": [
            {
                "id": t.id,
                "name": t.name,
                "priority": t.priority,
                "gpus": t.gpus,
                "waiting_for": w.text,
                "waiting_kind": w.kind,
            }
            for t, w in listed
        ],
        "queued_more": len(page.waiting) - len(listed),
        "held": [_short(job) for job in page.jobs if job.state is State.HELD],
        "ended": [_short(job) for job in reversed(page.jobs) if job.state.ended],
    }  # fmt: skip


def _in_lines(value: dict[str, Any]) -> str:
    """As JSON, a job or file a line: of thousands, indenting each field would take most of the daemon's time."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_list_in_lines(item)}" for key, item in value.items()) + "\n}\n"


def _list_in_lines(item: Any) -> str:
    if not isinstance(item, list) or not item:
        return _line(item)
    return "[\n" + ",\n".join(map(_line, item)) + "\n]"


def _line(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False, allow_nan=False)


def _running(job: JobView) -> dict[str, Any]:
    numbers = ("step", "total_steps", "epoch", "loss", "eta_seconds")
    return {**_short(job), "attempt": job.attempt, **{key: job.status.get(key) for key in numbers}}


def _short(job: JobView) -> dict[str, Any]:
    return {"id": job.id, "name": job.name, "state": job.state.value, "reason": job.reason, "message": job.message}


def as_markdown(page: Page) -> str:
    """The content of STATUS.md."""
    parts = [f"# Dropforge: {page.daemon}\n\n{utc_now()} (UTC)\n\n{_AGE}\n"]
    if page.problems:
        parts.append("## Problems\n\n" + "".join(f"- {_cell(problem)}\n" for problem in page.problems))
    active = [job for job in page.jobs if not job.state.ended and job.state is not State.HELD]
    if active:
        parts.append(
            _table("Running", ("job", "state", "progress"), [(j.id, j.state.value, _progress(j)) for j in active])
        )
    if page.waiting:
        listed = [(t.id, str(t.priority), w.text) for t, w in page.waiting[:ENDED_LISTED]]
        parts.append(_table("Queue", ("job", "priority", "waits for"), listed) + _more(len(page.waiting) - len(listed)))
    held = [job for job in page.jobs if job.state is State.HELD]
    if held:
        parts.append(_table("Held: these need you", ("job", "reason", "message"),
                            [(j.id, j.reason or "", j.message) for j in held]))  # fmt: skip
    if page.inbox:
        files = [(e.file, e.stage, e.message) for e in page.inbox[:ENDED_LISTED]]
        more = _more(len(page.inbox) - len(files) + page.inbox_more)
        parts.append(_table("Inbox", ("file", "", ""), files) + more)
    over = [(j.id, j.state.value, _outcome(j)) for j in reversed(page.jobs) if j.state.ended]
    if over:
        parts.append(_table("Lately ended", ("job", "state", ""), over))
    if len(parts) == 1:
        parts.append("Nothing to do. Drop a job into inbox/.\n")
    return "\n".join(parts)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def _more(number: int) -> str:
    return f"\n... and {number} more\n" if number else ""


def _cell(text: str) -> str:
    """Text that stays text inside a Markdown table."""
    shown = printable(text.replace("\n", " "), limit=300)
    for character in "\\`*_[]|":
        shown = shown.replace(character, f"\\{character}")
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _progress(job: JobView) -> str:
    step, total, loss, eta = (job.status.get(key) for key in ("step", "total_steps", "loss", "eta_seconds"))
    parts = []
    if isinstance(step, int):
        parts.append(f"step {step}" + (f" of {total}" if isinstance(total, int) else ""))
    if isinstance(loss, float):
        parts.append(f"loss {loss:.4f}")
    if isinstance(eta, int):
        parts.append(f"about {eta // 60} min left" if eta >= 120 else f"about {eta} s left")
    return ", ".join(parts) or job.message


def _outcome(job: JobView) -> str:
    if job.state is State.REJECTED:
        return f"{job.message} (rejected/{job.id}/ERROR.txt)"
    if job.state is State.SUCCEEDED and job.result is not None:
        return "/".join(job.result.parts[-3:])
    return job.message
