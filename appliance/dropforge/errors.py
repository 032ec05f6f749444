"""Every error a user can meet, with a stable code, a reason for the queue and an exit status.

DropforgeError
├── InputError              2   the user's file, command or data must change
│   ├── SpecError               the job spec is not valid; carries every problem found at once
│   ├── DataError               the data set cannot be read, understood or learnt from
│   ├── ModelError              the model cannot be found or does not fit the job
│   └── CommandError            a command was asked something that makes no sense
├── EnvironmentFault        3   this machine cannot do it: a tool, space, memory or a device is missing
├── JobError                1   the job ran and failed
│   ├── TrainingError           NaN loss, out of memory, a crash inside the training loop
│   └── ExportError             an export could not be made or did not pass its verification
└── JobStopped              1   somebody asked the job to stop; not a failure

Codes are the interface: scripts and docs/reference/errors.md rely on them, messages may be reworded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Why a job is in its state. State and reason are separate fields (docs/reference/states.md)."""

    INVALID_SPEC = "invalid_spec"
    MISSING_INPUT = "missing_input"
    BAD_DATA = "bad_data"
    AUTH = "auth"
    OFFLINE = "offline"
    REMOTE_CODE = "remote_code"
    DISK = "disk"
    OOM_GPU = "oom_gpu"
    OOM_HOST = "oom_host"
    GPU_LOST = "gpu_lost"
    NAN_LOSS = "nan_loss"
    STALLED = "stalled"
    TIMEOUT = "timeout"
    KILLED = "killed"
    CRASH = "crash"
    EXPORT = "export"
    USER = "user"
    SHUTDOWN = "shutdown"
    DUPLICATE = "duplicate"
    ENVIRONMENT = "environment"
    INTERNAL = "internal"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, where, why, and what to do about it."""

    code: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.what} [{self.code}]"]
        for label, text in (("where", self.where), ("why", self.why), ("fix", self.fix)):
            if text:
                lines.append(f"  {label + ':':<7}{text}")
        return "\n".join(lines)


class DropforgeError(Exception):
    """Base of every error Dropforge raises on purpose. Not raised itself: a bare one would say nothing."""

    exit_status = 1
    reason = Reason.INTERNAL

    def __init__(
        self, what: str, *, code: str, where: str = "", why: str = "", fix: str = "", reason: Reason | None = None
    ) -> None:
        self.problems: tuple[Problem, ...] = (Problem(code=code, what=what, where=where, why=why, fix=fix),)
        if reason is not None:
            self.reason = reason
        super().__init__(what)

    @property
    def code(self) -> str:
        return self.problems[0].code

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """The form written to status.json, exit.json and `--json` output."""
        return {"reason": self.reason.value, "problems": [asdict(problem) for problem in self.problems]}


class InputError(DropforgeError):
    """The user's file, command or data must change."""

    exit_status = 2
    reason = Reason.INVALID_SPEC


class SpecError(InputError):
    """The job spec is not valid. Holds every problem found, not only the first."""

    @classmethod
    def of(cls, problems: list[Problem]) -> SpecError:
        """One error for several problems; `problems` must not be empty."""
        first = problems[0]
        error = cls(first.what, code=first.code)
        error.problems = tuple(problems)
        return error


class DataError(InputError):
    """The data set cannot be read, understood or learnt from."""

    reason = Reason.BAD_DATA


class ModelError(InputError):
    """The model cannot be found, or does not fit the job."""

    reason = Reason.MISSING_INPUT


class CommandError(InputError):
    """A command was asked something that makes no sense, such as cancelling a job that does not exist."""


class EnvironmentFault(DropforgeError):  # noqa: N818  (an OSError alias is called EnvironmentError)
    """This machine cannot do it: a tool, disk space, memory or a device is missing."""

    exit_status = 3
    reason = Reason.ENVIRONMENT


class JobError(DropforgeError):
    """The job ran and failed."""

    reason = Reason.CRASH


class TrainingError(JobError):
    """NaN loss, out of memory, or a crash inside the training loop."""


class ExportError(JobError):
    """An export could not be made, or did not pass its verification."""

    reason = Reason.EXPORT


class JobStopped(DropforgeError):  # noqa: N818  (a request, not an error)
    """Somebody asked the job to stop (cancel, shutdown). `reason` says who."""

    reason = Reason.USER
