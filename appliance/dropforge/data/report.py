"""What was understood of the data: printed, kept in the run's record, and the base of the data card."""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_DROPPED = 20


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
