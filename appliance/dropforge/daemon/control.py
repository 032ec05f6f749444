"""`control/`: what people ask of the daemon, one small file each. `request` writes one, `pending` reads them.

<id>.cancel .checkpoint .retry .release    empty files
<id>.priority                              holds a number from 0 to 100
pause, drain                               stay in force while they exist (drain: until the daemon has stopped)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dropforge.daemon.names import printable
from dropforge.daemon.queue import FOLDERS, find
from dropforge.errors import CommandError
from dropforge.files import write_text
from dropforge.paths import DataRoot

MAX_PRIORITY = 100
_NUMBER_BYTES = 16


class Action(StrEnum):
    """What can be asked about one job."""

    CANCEL = "cancel"
    CHECKPOINT = "checkpoint"
    RETRY = "retry"
    RELEASE = "release"
    PRIORITY = "priority"

    @property
    def folders(self) -> tuple[str, ...]:
        """Where the job's ticket may lie for this."""
        return _FOLDERS[self]


_FOLDERS = {
    Action.CANCEL: ("queue", "running", "held"),
    Action.CHECKPOINT: ("running",),
    Action.RETRY: ("held", "failed", "partial", "cancelled"),
    Action.RELEASE: ("held",),
    Action.PRIORITY: ("queue", "held"),
}


class Switch(StrEnum):
    """What can be asked of the daemon as a whole."""

    PAUSE = "pause"
    DRAIN = "drain"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One file of control/ about one job."""

    job_id: str
    action: Action
    path: Path
    number: int | None = None
    """The new priority."""


def request(root: DataRoot, job_id: str, action: str, *, priority: int | None = None) -> Path:
    """Ask something about a job; the daemon does it at its next look. Returns the file that was written.

    Raises CommandError: action-unknown, job-unknown, action-impossible (the job is not in a state for it).
    """
    if action not in list(Action):
        raise CommandError(f"unknown action {action!r}", code="action-unknown", where="control",
                           fix=f"one of: {', '.join(Action)}")  # fmt: skip
    wanted = Action(action)
    found = find(root, job_id)
    if found is None:
        raise CommandError(f"there is no job {printable(job_id)!r}", code="job-unknown", where=str(root.path),
                           why="no ticket carries this id", fix="`dropforge status` lists the jobs")  # fmt: skip
    if found[0] not in wanted.folders:
        raise CommandError(
            f"a job in {found[0]}/ cannot be asked to {action}", code="action-impossible", where=job_id,
            why=f"{action} works on jobs in {', '.join(f'{name}/' for name in wanted.folders)}",
            fix="`dropforge status` shows where it stands",
        )  # fmt: skip
    if wanted is Action.PRIORITY and (priority is None or not 0 <= priority <= MAX_PRIORITY):
        raise CommandError(f"a priority is a whole number from 0 to {MAX_PRIORITY}", code="action-value", where=job_id,
                           why=f"it is {priority}", fix="higher runs first; 50 is the default")  # fmt: skip
    path = root.control / f"{job_id}.{action}"
    write_text(path, f"{priority}\n" if wanted is Action.PRIORITY else "")
    return path


def set_switch(root: DataRoot, switch: Switch, *, on: bool) -> None:
    path = root.control / switch.value
    if on:
        write_text(path, "")
    else:
        path.unlink(missing_ok=True)


def is_on(root: DataRoot, switch: Switch) -> bool:
    return os.path.lexists(root.control / switch.value)


def pending(root: DataRoot) -> tuple[list[Request], list[Path]]:
    """Requests by name, and files that mean nothing (unknown job or action, no number)."""
    requests, meaningless = [], []
    with os.scandir(root.control) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        if name in list(Switch):
            continue
        job_id, _, action = name.rpartition(".")
        path = root.control / name
        number = _number(path) if action == Action.PRIORITY else None
        bad_number = action == Action.PRIORITY and number is None
        if action not in list(Action) or bad_number or not _has_ticket(root, job_id):
            meaningless.append(path)
        else:
            requests.append(Request(job_id=job_id, action=Action(action), path=path, number=number))
    return requests, meaningless


def _has_ticket(root: DataRoot, job_id: str) -> bool:
    return any((root.path / folder / f"{job_id}.json").is_file() for folder in FOLDERS)


def _number(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as stream:
            number = int(stream.read(_NUMBER_BYTES))
    except (OSError, ValueError):
        return None
    return number if 0 <= number <= MAX_PRIORITY else None
