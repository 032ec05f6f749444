"""`runs/<id>/attempts/NNN/`: one folder per start of a job, and how it ended.

    log.txt      what the job printed (log_pump.py: clean and capped)
    stop.json    {"reason"}: somebody asked this attempt to stop (written before the signal is sent)
    exit.json    how it ended, written by the runner, or by the daemon when the runner died

An attempt without exit.json is running or died; an empty one never started and its number is used again.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dropforge.errors import Reason
from dropforge.files import fsync_folder, read_json, write_json
from dropforge.paths import RunFolder
from dropforge.states import State


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job has come: what two deaths are compared by."""

    step: int = 0
    checkpoint: int = 0
    """Step of the newest checkpoint, 0 without one."""


_STATES = {state.value: state for state in State}


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """The content of exit.json."""

    state: State
    """succeeded, partial, failed; interrupted: stopped on request, or died."""
    reason: Reason | None = None
    message: str = ""
    problems: tuple[dict[str, str], ...] = ()
    seconds: float = 0.0
    """Wall time of this attempt."""
    progress: Progress = Progress()
    died: bool = False
    """True when the runner wrote no exit.json: killed, crashed, or the machine went down."""
    with_daemon: bool = False
    """True when the daemon had gone down too, which is no sign against the job."""
    no_space: bool = False
    """True when the disk became full while it ran."""
    freed: int = 0
    """Bytes it then gave back by itself."""

    def as_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AttemptEnd:
        """Raises KeyError, TypeError or ValueError for a file that somebody edited."""
        return cls(
            state=_STATES[value["state"]],
            reason=Reason(value["reason"]) if value.get("reason") else None,
            message=str(value.get("message", "")),
            problems=tuple(value.get("problems", ())),
            seconds=float(value.get("seconds", 0.0)),
            progress=Progress(**value.get("progress", {})),
            died=bool(value.get("died", False)),
            with_daemon=bool(value.get("with_daemon", False)),
            no_space=bool(value.get("no_space", False)),
            freed=int(value.get("freed", 0)),
        )


def numbers(run: RunFolder) -> list[int]:
    """Numbers of all attempts, ascending."""
    folder = run.path / "attempts"
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if re.fullmatch(r"\d{3,}", entry.name))


def log_of(run: RunFolder, number: int) -> Path:
    """What the attempt printed; an older part of much output is in log.1.txt beside it."""
    return run.attempt(number) / "log.txt"


def started(run: RunFolder, number: int) -> bool:
    """False for a folder that was made and never used, because the daemon died in between."""
    return any(run.attempt(number).iterdir())


def open_next(run: RunFolder) -> int:
    """Make the folder of the next attempt, durably, and return its number."""
    known = numbers(run)
    number = known[-1] if known and not started(run, known[-1]) else (known[-1] if known else 0) + 1
    run.attempt(number).mkdir(parents=True, exist_ok=True)
    fsync_folder(run.attempt(number).parent)
    return number


def write_end(run: RunFolder, number: int, end: AttemptEnd) -> None:
    write_json(run.attempt(number) / "exit.json", end.as_json())


def read_end(run: RunFolder, number: int) -> AttemptEnd | None:
    """None while it runs, after a death, or when the file is not readable as an end."""
    path = run.attempt(number) / "exit.json"
    try:
        return AttemptEnd.from_json(read_json(path))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None


def ends(run: RunFolder, *, after: int = 0) -> list[AttemptEnd]:
    """Ends of the attempts with a number above `after`, oldest first."""
    found = (read_end(run, number) for number in numbers(run) if number > after)
    return [end for end in found if end is not None]


def write_stop(run: RunFolder, number: int, reason: Reason) -> None:
    write_json(run.attempt(number) / "stop.json", {"reason": reason.value})


def read_stop(run: RunFolder, number: int) -> Reason | None:
    """Why this attempt was asked to stop; None when it was not."""
    try:
        return Reason(read_json(run.attempt(number) / "stop.json")["reason"])
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None


def progress(run: RunFolder) -> Progress:
    """How far the job has come, from status.json and the names of its complete checkpoints."""
    return Progress(step=_step_in_status(run.status), checkpoint=newest_checkpoint(run))


def newest_checkpoint(run: RunFolder) -> int:
    """Step of the newest checkpoint folder; names end in the step (`checkpoint-120`, `step-00000120`)."""
    if not run.checkpoints.is_dir():
        return 0
    steps = (
        re.search(r"(\d+)$", entry.name)
        for entry in run.checkpoints.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    return max((int(step[1]) for step in steps if step), default=0)


def _step_in_status(path: Path) -> int:
    try:
        step = read_json(path).get("step")
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return 0
    return step if isinstance(step, int) and not isinstance(step, bool) else 0
