"""What was understood of the data: printed, kept in the run's record, and the base of the data card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dropforge.data.lengths import Packing

FIRST_DROPPED = 20
DATA_CARD = "DATA_CARD.md"
"""Name of the report in a result folder."""


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """One data file. `path` is as the spec names it (a file in a named folder: folder/file)."""

    path: str
    sha256: str
    bytes: int
    rows: int
    format: str
    format_reason: str


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Numbers about the prepared training rows. JSON-able through dataclasses.asdict."""

    files: tuple[FileReport, ...]
    format: str
    """The format of the files; several are joined by ` + `."""
    format_reason: str
    rows_read: int
    rows: int
    """Training rows: after dropping, splitting off evaluation rows, cutting documents and repeating by weight."""
    eval_rows: int
    rows_dropped: int
    dropped: tuple[tuple[str, str], ...]
    """The first 20 dropped rows as (file:row, why)."""
    dropped_reasons: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    """Rows cut to max_seq_length."""
    tokens: int = 0
    """Tokens of one epoch."""
    trained_tokens: int = 0
    """Tokens of one epoch that the loss sees."""
    longest: int = 0
    """Tokens of the longest training row, after cutting."""
    end_of_turn: str = ""
    """The text that ends an answer in this chat template."""
    system: str | None = None
    """The system message that all conversations share; None when there is none, or more than one."""
    warnings: tuple[str, ...] = ()
    mean_length: float = 0.0
    """Tokens per training row."""
    histogram: tuple[tuple[int, int, int], ...] = ()
    """(from, to, rows) by tokens before cutting."""
    packing: tuple[Packing, ...] = ()
    """How well the rows pack into longer ones."""
    suggested_length: int = 0
    """model.max_seq_length that would hold 99 % of the rows whole."""
    roles: dict[str, int] = field(default_factory=dict)
    """Turns by role, of the rows as read."""
    languages: dict[str, float] = field(default_factory=dict)
    """Shares, guessed from the first 1,000 rows and every 16th one behind them."""
    sources: tuple[tuple[str, float, int, int], ...] = ()
    """(path, weight, rows with something to learn, rows after dropping duplicates, splitting and weighing)."""
    duplicates: int = 0
    """Rows dropped because an equal one is there."""
    contaminated: tuple[tuple[str, str], ...] = ()
    """The first 20 training rows that stand in the evaluation data too, as (file:row, file:row)."""
    contaminated_rows: int = 0
    examples: tuple[tuple[tuple[str, bool], ...], ...] = ()
    """The first training rows as the model sees them: (text, is it learnt) in turn."""
    train_on: str = "responses"


def report_of(saved: dict[str, Any]) -> DataReport:
    """The report from its saved form (dataclasses.asdict, through JSON)."""
    files = tuple(FileReport(**file) for file in saved["files"])
    packing = tuple(Packing(**entry) for entry in saved["packing"])
    return DataReport(**{**saved, "files": files, "packing": packing})
