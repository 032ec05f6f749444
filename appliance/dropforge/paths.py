"""The only file that knows folder names. `DataRoot` is DESIGN section 4, `RunFolder` and `ResultFolder` its parts."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from dropforge.errors import EnvironmentFault
from dropforge.states import State

TICKET_FOLDERS: dict[State, str] = {
    State.QUEUED: "queue",
    State.INTERRUPTED: "queue",
    State.HELD: "held",
    State.PREPARING: "running",
    State.TRAINING: "running",
    State.EXPORTING: "running",
    State.CANCELLING: "running",
    State.SUCCEEDED: "done",
    State.PARTIAL: "partial",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
    State.REJECTED: "rejected",
}


def refuse_links(folder: Path, *, below: Path) -> None:
    """Every part of `folder` under `below` that exists must be a real folder: a link could lead the writer out.

    Raises EnvironmentFault (path-is-link).
    """
    current = below
    for part in folder.relative_to(below).parts:
        current = current / part
        try:
            mode = current.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            raise EnvironmentFault(
                f"{current.relative_to(below)} is not a folder any more", code="path-is-link", where=str(current),
                why="it was replaced, by a symbolic link or a file, and could lead out of the data root",
                fix="put the folder itself back, then `dropforge retry`",
            )  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """`runs/<id>/`: created once, never moved, because trainer state records absolute paths."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def spec_original(self) -> Path:
        return self.path / "spec.orig"

    @property
    def spec_resolved(self) -> Path:
        return self.path / "spec.resolved.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def error_text(self) -> Path:
        """What went wrong, for people; there only when something did."""
        return self.path / "ERROR.txt"

    @property
    def lease(self) -> Path:
        return self.path / "lease.json"

    @property
    def job_data(self) -> Path:
        """Copy of the data files that came in a NAME.job/ folder."""
        return self.path / "data"

    @property
    def code(self) -> Path:
        """The code that came with the model, file by file, when the job was held because of it."""
        return self.path / "code.json"

    @property
    def imatrix(self) -> Path:
        """The importance matrix that came with the job."""
        return self.path / "imatrix.gguf"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def trained(self) -> Path:
        """The trained weights (adapter or full model), in place once training has ended."""
        return self.path / "trained"

    def attempt(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:03d}"


@dataclass(frozen=True)
class ResultFolder:
    """`results/<name>/<id>/`: what the user takes away. `COMPLETE` is written last."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def gguf(self) -> Path:
        return self.path / "gguf"

    @property
    def fp8(self) -> Path:
        return self.path / "fp8"

    @property
    def fp8_block(self) -> Path:
        return self.path / "fp8-block"

    @property
    def fp8_static(self) -> Path:
        return self.path / "fp8-static"

    @property
    def merged_4bit(self) -> Path:
        return self.path / "merged_4bit"

    @property
    def lora_gguf(self) -> Path:
        """Apart from gguf/, because what lies there is a whole model."""
        return self.path / "lora_gguf"

    @property
    def modelfile(self) -> Path:
        return self.path / "Modelfile"

    @property
    def model_card(self) -> Path:
        return self.path / "MODEL_CARD.md"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def spec_resolved(self) -> Path:
        return self.path / "spec.resolved.yaml"

    @property
    def checksums(self) -> Path:
        return self.path / "SHA256SUMS"

    @property
    def complete(self) -> Path:
        return self.path / "COMPLETE"


@dataclass(frozen=True)
class DataRoot:
    """The one folder that holds everything mutable. All of it must lie on one mount, so that renames are atomic."""

    path: Path

    FOLDERS = (
        "inbox/.staging",
        "queue",
        "running",
        "held",
        "done",
        "partial",
        "failed",
        "cancelled",
        "rejected",
        "control",
        "runs",
        "results",
        "datasets",
        "models",
        "cache",
        "secrets",
        "schema",
        "state",
    )

    def create(self) -> DataRoot:
        """Make the folders that are missing; existing ones are left as they are."""
        for name in self.FOLDERS:
            mode = 0o700 if name == "secrets" else 0o755
            (self.path / name).mkdir(parents=True, exist_ok=True, mode=mode)
        return self

    @property
    def inbox(self) -> Path:
        return self.path / "inbox"

    @property
    def staging(self) -> Path:
        return self.path / "inbox" / ".staging"

    @property
    def rejected(self) -> Path:
        return self.path / "rejected"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def datasets(self) -> Path:
        return self.path / "datasets"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets"

    @property
    def schema(self) -> Path:
        return self.path / "schema"

    @property
    def state(self) -> Path:
        """The daemon's own small files: sequence number, heartbeat."""
        return self.path / "state"

    @property
    def status_page(self) -> Path:
        return self.path / "STATUS.md"

    @property
    def queue_json(self) -> Path:
        return self.path / "queue.json"

    def tickets(self, state: State) -> Path:
        return self.path / TICKET_FOLDERS[state]

    def run(self, job_id: str) -> RunFolder:
        return RunFolder(self.path / "runs" / job_id)

    def result(self, name: str, job_id: str) -> ResultFolder:
        return ResultFolder(self.path / "results" / name / job_id)
