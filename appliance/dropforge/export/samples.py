"""The first training rows, kept beside the trained weights: exports are checked with, and calibrated on, real data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropforge.files import read_json, write_json

FILE = "samples.json"
EVAL_FILE = "eval_samples.json"
ROWS = 512
TOKENS = 65_536
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One row as the model saw it."""

    ids: tuple[int, ...]
    prompt: int
    """How many tokens come before the first that was learnt; 0 when everything is learnt."""


def write_samples(rows: Iterable[Mapping[str, Any]], folder: Path, *, file: str = FILE) -> None:
    """Keep the first rows (columns input_ids and labels): at most ROWS, and TOKENS tokens of them.

    `file` is EVAL_FILE for rows of the evaluation split.
    """
    kept: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        ids, labels = [int(token) for token in row["input_ids"]], list(row["labels"])
        tokens += len(ids)
        if len(kept) == ROWS or (kept and tokens > TOKENS):
            break
        prompt = next((place for place, label in enumerate(labels) if label != IGNORED), len(ids))
        kept.append({"prompt": prompt, "ids": ids})
    write_json(folder / file, kept)


def read_samples(folder: Path, *, file: str = FILE) -> tuple[TrainingRow, ...]:
    """What write_samples kept; nothing for weights trained by an earlier release, or without an evaluation split."""
    path = folder / file
    if not path.exists():
        return ()
    return tuple(TrainingRow(ids=tuple(row["ids"]), prompt=row["prompt"]) for row in read_json(path))
