"""Printing for people and for programs."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dropforge.paths import DataRoot
from dropforge.settings import settings


def data_root(arguments: Namespace, *, create: bool = False) -> DataRoot:
    """--data, else DROPFORGE_DATA. Commands that only look leave the disk as it is."""
    chosen: Path | None = getattr(arguments, "data", None)
    root = DataRoot((chosen or settings().data_root).absolute())
    return root.create() if create else root


def emit(arguments: Namespace, value: Any, text: str) -> None:
    """`value` as one JSON document with --json, else `text`."""
    print(json.dumps(value, ensure_ascii=False, indent=2) if arguments.json else text)


def table(rows: Sequence[tuple[str, ...]], *, header: tuple[str, ...] | None = None) -> str:
    """Left-aligned columns separated by two spaces."""
    every = [header, *rows] if header else rows
    if not every:
        return ""
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in every)


def gib(size: int | None) -> str:
    """Bytes for people; '?' when unknown."""
    if size is None:
        return "?"
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 28 else f"{size / (1 << 20):.0f} MiB"
