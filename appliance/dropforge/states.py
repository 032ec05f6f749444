"""The states a job can be in, one line of meaning each (docs/reference/states.md is written from this)."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a job stands. `status.json` holds it beside a separate `reason`."""

    REJECTED = "rejected", "the spec never became a job"
    QUEUED = "queued", "accepted and waiting; `waiting_for` says for what"
    HELD = "held", "needs a person; `message` says what to do"
    PREPARING = "preparing", "download, read and tokenise the data, load the model"
    TRAINING = "training", "optimizer steps advance"
    EXPORTING = "exporting", "the trained weights are safe, the asked formats are being made"
    INTERRUPTED = "interrupted", "the daemon or the machine stopped; the job resumes by itself"
    CANCELLING = "cancelling", "asked to stop; saving or ending"
    SUCCEEDED = "succeeded", "trained, exported and verified"
    PARTIAL = "partial", "the adapter is good, some export failed; `retry` repeats only the exports"
    FAILED = "failed", "`reason` and `message` say why"
    CANCELLED = "cancelled", "stopped by a person"

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> State:
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({State.REJECTED, State.SUCCEEDED, State.PARTIAL, State.FAILED, State.CANCELLED})
