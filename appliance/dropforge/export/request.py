"""What an export is asked for, and what it reports back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dropforge.errors import DropforgeError, Problem
from dropforge.export.samples import TrainingRow
from dropforge.paths import ResultFolder

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Everything the exporters need. Exactly one of `adapter` and `full` is set."""

    base_path: Path
    """Hugging Face folder of the model the training started from, as it came: not the copy a QLoRA run quantised."""
    tokenizer: Path
    """Folder of the training tokenizer, with its chat template."""
    result: ResultFolder
    work: Path
    """Scratch folder on the same file system as `result`; the caller removes it."""
    kinds: tuple[str, ...]
    """Entries of the spec's `export`: adapter, merged, gguf:TYPE, ollama."""
    name: str
    slug: str
    """Start of every file name."""
    model_id: str
    """How the base is called in metadata; never a path of this machine."""
    originals: tuple[Path, ...] = ()
    """Folders that may hold the 16-bit weights of a base whose own files are quantised."""
    adapter: Path | None = None
    """PEFT folder of the trained adapter."""
    full: Path | None = None
    """Hugging Face folder of fully trained weights."""
    system: str | None = None
    """System message for the Modelfile."""
    license: str = ""
    samples: tuple[TrainingRow, ...] = ()
    """First rows of the training data; the verification asks the prompts of some of them too."""

    imatrix: Path | None = None
    """The user's importance matrix, for every quantised GGUF; without one it is computed where a type needs it."""
    eval_samples: tuple[TrainingRow, ...] = ()
    """First rows of the evaluation split; every export's agreement with the trained model is measured over them."""

    runs_code: bool = False
    """The base can only be loaded with code that came with it, and a person approved that code."""

    def __post_init__(self) -> None:
        assert (self.adapter is None) != (self.full is None), "give either adapter or full"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """How one export went. `checks` holds the measured numbers of its verification."""

    kind: str
    ok: bool
    path: str
    """Relative to the result folder; empty when nothing was made."""
    bytes: int
    seconds: float
    checks: dict[str, Any] = field(default_factory=dict)
    problem: Problem | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form, for status and provenance."""
        return asdict(self)

    @classmethod
    def failed(cls, kind: str, error: DropforgeError, *, seconds: float) -> ExportReport:
        return cls(kind=kind, ok=False, path="", bytes=0, seconds=seconds, problem=error.problems[0])


@dataclass(frozen=True, kw_only=True)
class Made:
    """What an exporter hands back: where the verified export lies, and its numbers."""

    path: Path
    checks: dict[str, Any]
    name: str = ""
    """Name of a folder that is one of several of its kind."""
