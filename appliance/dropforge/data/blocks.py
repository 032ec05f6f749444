"""Pieces of a data file that are turned into rows where they are worked on: here, or in another process.

Lines of JSON travel as the bytes they are. Rows of other files, which were read already, travel as their fields.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dropforge.data.encoding import decoded_lines, open_bytes, readable
from dropforge.data.readers import json_rows
from dropforge.data.rows import Row

LINE_BYTES = 1 << 18
BLOCK_ROWS = 512
BLOCK_CHARACTERS = 4_000_000
"""A block ends early when its texts are long, so that memory stays bounded."""


class Block(Protocol):
    """Some rows of one file, in order."""

    def rows(self) -> list[Row]:
        """Raises DataError with file and line for what cannot be read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LineBlock:
    """Whole lines of a JSONL file as bytes, the first of them being line number `first`."""

    file: str
    first: int
    content: bytes

    def rows(self) -> list[Row]:
        return list(json_rows(self._lines(), file=self.file))

    def _lines(self) -> Iterable[tuple[int, str]]:
        if self.first > 1 and b"\0" not in self.content:
            try:
                return enumerate(self.content.decode().split("\n"), start=self.first)
            except UnicodeDecodeError:
                pass  # the line it is in is looked for below
        return decoded_lines(io.BytesIO(self.content), file=self.file, first=self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Rows as (file, number, fields), which a pickle holds in less room and time than as objects."""

    content: list[tuple[str, int, dict[str, Any]]]

    def rows(self) -> list[Row]:
        return [Row(file=file, number=number, fields=fields) for file, number, fields in self.content]


def line_blocks(path: Path, *, file: str) -> Iterator[LineBlock]:
    """A JSONL file (perhaps compressed), cut at line ends. Raises DataError data-parse for damaged compression."""
    first = 1
    with readable(file), open_bytes(path) as stream:
        while content := stream.read(LINE_BYTES):
            content += stream.readline()
            yield LineBlock(file=file, first=first, content=content)
            first += content.count(b"\n")


def row_blocks(rows: Iterable[Row]) -> Iterator[RowBlock]:
    """Any rows, BLOCK_ROWS at a time."""
    content: list[tuple[str, int, dict[str, Any]]] = []
    characters = 0
    for row in rows:
        content.append((row.file, row.number, row.fields))
        characters += row.size
        if len(content) >= BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield RowBlock(content=content)
            content, characters = [], 0
    if content:
        yield RowBlock(content=content)
