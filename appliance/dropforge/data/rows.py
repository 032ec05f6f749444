"""One row of a data file as it was read, before anybody knows what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Fields by column name, and where the row stands: a line number in text files, else a row number, from 1."""

    file: str
    number: int
    fields: dict[str, Any]

    @property
    def where(self) -> str:
        """As errors print it: `tickets.csv:17`."""
        return f"{self.file}:{self.number}"

    @property
    def size(self) -> int:
        """Roughly how many characters it holds."""
        return sum(_size(value) for value in self.fields.values())


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values())
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    return 8
