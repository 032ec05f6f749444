"""Which runs are worth a machine's time, in order: every named part is a list, and a part can be taken up again.

An entry is (engine, model, data, warm-up steps, measured steps, seconds it will about take). A run that a results file
has already is not run again; one whose estimate does not fit into what is left of the time is left out.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One process."""

    engine: str
    model: str
    data: str
    warm: int
    steps: int
    seconds: int
    """Estimate, imports and compilation included."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a row of the results file is told by."""
        return self.engine, self.model, self.data


OURS, THEIRS = "dropforge_packed", "unsloth_packed"
COLD = (12, 190)
"""Warm-up and measured steps with which the first 200 steps are measured, not extrapolated."""


def _beside(model: str, data: str, *, cold: int, ours: int, theirs: int) -> tuple[Run, ...]:
    """Ours, Unsloth, ours (A-B-A); the first of ours long enough for the cold 200 steps. Estimates in seconds."""
    return (
        Run(OURS, model, data, *COLD, cold),
        Run(THEIRS, model, data, 8, 25, theirs),
        Run(OURS, model, data, 12, 40, ours),
    )


def _once(model: str, data: str, *, ours: int, theirs: int) -> tuple[Run, ...]:
    return Run(OURS, model, data, 12, 30, ours), Run(THEIRS, model, data, 8, 20, theirs)


def _defaults(model: str, *, load: int) -> tuple[Run, ...]:
    """Batch 2, accumulation 4: what each project's own examples say. A peer's step takes one to three seconds."""
    return (
        Run("unsloth", model, "alpaca", 5, 15, 65 + load),
        Run("trl", model, "alpaca", 4, 10, 70 + load),
        Run("dropforge", model, "alpaca", *COLD, 40 + 2 * load),
        Run("hf_liger", model, "alpaca", 4, 10, 70 + load),
    )


_FIXED = {"qwen3-0.6b": (30, 50), "qwen3-4b": (50, 75), "llama-3.1-8b": (65, 85)}

PARTS: dict[str, tuple[Run, ...]] = {
    "4b": _beside("qwen3-4b", "alpaca", cold=95, ours=50, theirs=80),
    "0.6b": _beside("qwen3-0.6b", "alpaca", cold=40, ours=30, theirs=65),
    "8b": _beside("llama-3.1-8b", "alpaca", cold=135, ours=65, theirs=90),
    "defaults-0.6b": _defaults("qwen3-0.6b", load=0),
    "defaults-4b": _defaults("qwen3-4b", load=15),
    "defaults-8b": _defaults("llama-3.1-8b", load=25),
    **{
        f"{data}-{short}": _once(model, data, ours=_FIXED[model][0], theirs=_FIXED[model][1])
        for data in ("chat", "fixed")
        for short, model in (("0.6b", "qwen3-0.6b"), ("4b", "qwen3-4b"), ("8b", "llama-3.1-8b"))
    },
    "cold": (
        Run(THEIRS, "qwen3-0.6b", "alpaca", *COLD, 190),
        Run(THEIRS, "qwen3-4b", "alpaca", *COLD, 235),
        Run(THEIRS, "llama-3.1-8b", "alpaca", *COLD, 250),
    ),
    # Rows of one length need no packing: one at a time takes Unsloth's compiled path, which packed rows do not.
    "fixed-unpacked": tuple(
        Run("unsloth_rows", model, "fixed", 8, 20, seconds)
        for model, seconds in (("qwen3-4b", 75), ("qwen3-0.6b", 50), ("llama-3.1-8b", 85))
    ),
}
"""In order of worth: what the targets name first, then the documented defaults, then other lengths."""


def pending(parts: Iterable[str], done: Iterable[Path]) -> Iterator[Run]:
    """The parts' runs in order, without those that rows of the results files stand for already.

    Raises KeyError for a part that does not exist.
    """
    rows: set[tuple[tuple[str, str], ...]] = set()  # a row may stand in several copies of a file
    for path in done:
        if path.exists():
            with path.open(newline="") as file:
                rows |= {tuple(row.items()) for row in csv.DictReader(file) if row["status"] == "ok"}
    have = Counter((row["engine"], row["model"], row["data"]) for row in map(dict, rows))
    for run in (run for part in parts for run in PARTS[part]):
        if have[run.key] > 0:
            have[run.key] -= 1
        else:
            yield run
