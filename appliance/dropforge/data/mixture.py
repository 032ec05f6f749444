"""Which rows are for training and which for evaluation, and how often each is seen. Decided by the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dropforge.data.table import Indices, TokenTable


def split(table: TokenTable, *, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """(train, eval) row numbers, each in file order.

    Equal rows go to the same side, so that nothing evaluated was trained on. At least one row on each side if there
    are two different rows; with a single one the evaluation side is empty.
    """
    digests, groups, counts = np.unique(table.digests, return_inverse=True, return_counts=True)
    wanted = max(1, round(fraction * len(table)))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(digests))
    taken = np.cumsum(counts[order])
    number = int(np.searchsorted(taken, wanted)) + 1
    chosen = np.zeros(len(digests), dtype=bool)
    chosen[order[: min(number, len(digests) - 1)]] = True
    is_eval = chosen[groups]
    return np.flatnonzero(~is_eval), np.flatnonzero(is_eval)


def weighted(rows: Indices, *, sources: Indices, weights: Sequence[float], seed: int) -> Indices:
    """Repeat or thin out the rows of each source by its weight: 2.5 is every row twice and a random half once more.

    Args:
        rows: row numbers.
        sources: the source of every row of the table (indexed by row number).
        weights: the weight of every source.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    parts = []
    for number, weight in enumerate(weights):
        own = rows[sources[rows] == number]
        whole, rest = int(weight), weight - int(weight)
        extra = round(rest * len(own))
        if whole == 0 and extra == 0 and len(own):
            extra = 1
        picked = np.sort(generator.permutation(len(own))[:extra])
        parts.append(np.concatenate([np.tile(own, whole), own[picked]]))
    return np.concatenate(parts) if parts else rows
