"""What the lengths of rows say: how they are spread, how well they pack, and which maximum would do."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BUDGETS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SAMPLE = 10_000
"""Packing is tried on so many rows."""
BINS = 12


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows packed into `rows` rows of `budget` tokens; `efficiency` is the share of them that is no padding."""

    budget: int
    rows: int
    efficiency: float
    alone: float
    """The same share with one row per place and no packing."""


def histogram(lengths: npt.NDArray[Any]) -> list[tuple[int, int, int]]:
    """(from, to, rows) in bins of equal width, `to` included; at most 12 of them."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    counts = np.bincount((lengths - low) // width)
    return [(low + i * width, min(high, low + (i + 1) * width - 1), int(count)) for i, count in enumerate(counts)]


def packing(lengths: npt.NDArray[Any], *, budgets: Sequence[int] = BUDGETS, seed: int = 0) -> list[Packing]:
    """Packing by best fit decreasing at several budgets, those that hold at least 99 % of the rows whole."""
    if not len(lengths):
        return []
    if len(lengths) > SAMPLE:
        chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(lengths), SAMPLE, replace=False)
        sample = lengths[chosen]
    else:
        sample = lengths
    enough = float(np.quantile(sample, 0.99))
    fitting = [budget for budget in budgets if budget >= enough][:4] or [budgets[-1]]
    done = []
    for budget in fitting:
        cut = np.minimum(sample, budget)
        bins = best_fit(cut.tolist(), budget=budget)
        share = int(cut.sum()) / (bins * budget)
        rows = round(bins * len(lengths) / len(sample))
        done.append(Packing(budget=budget, rows=rows, efficiency=share, alone=int(cut.sum()) / (len(cut) * budget)))
    return done


def best_fit(lengths: Sequence[int], *, budget: int) -> int:
    """How many rows of `budget` tokens are needed; the longest first, each where the least room is left."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(room, length)
        left = (room.pop(at) if at < len(room) else budget) - length
        if left:
            insort(room, left)
        # A full row needs no place in the list; it is counted by its tokens below.
    total = sum(lengths) + sum(room)
    return max(1, -(-total // budget))


def suggested_length(full: npt.NDArray[Any]) -> int:
    """The smallest multiple of 64 that holds 99 % of the rows whole; 0 without rows."""
    if not len(full):
        return 0
    return max(64, -(-int(np.ceil(np.quantile(full, 0.99))) // 64) * 64)
