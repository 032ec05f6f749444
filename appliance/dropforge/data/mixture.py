"""Which rows are for training and which for evaluation, how often each is seen, and in which order.

Decided by the rows and the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dropforge.data.near import clusters
from dropforge.data.table import Indices, TokenTable

Mixing = Literal["repeat", "proportional"]


def groups(table: TokenTable) -> npt.NDArray[Any]:
    """A number per row, equal for rows that say the same: near-duplicates where signatures were made, else rows whose
    letters and digits are equal.
    """
    signatures = table.signatures
    return clusters(signatures) if signatures is not None else table.loose


def split(table: TokenTable, *, fraction: float, seed: int, rows: Indices | None = None) -> tuple[Indices, Indices]:
    """(train, eval) row numbers, each in file order.

    Rows that say the same go to the same side, so that nothing evaluated was trained on. At least one row on each side
    if there are two different rows; with a single one the evaluation side is empty.

    Args:
        rows: the rows to be split; all by default.
    """
    rows = np.arange(len(table), dtype=np.int64) if rows is None else rows
    found, members, counts = np.unique(groups(table)[rows], return_inverse=True, return_counts=True)
    wanted = max(1, round(fraction * len(rows)))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(found))
    taken = np.cumsum(counts[order])
    number = int(np.searchsorted(taken, wanted)) + 1
    chosen = np.zeros(len(found), dtype=bool)
    chosen[order[: min(number, len(found) - 1)]] = True
    is_eval = chosen[members]
    return rows[~is_eval], rows[is_eval]


def without_duplicates(table: TokenTable, *, near: bool) -> Indices:
    """The first row of each group of equal (or nearly equal) rows, in file order."""
    keys = groups(table) if near else table.digests
    _, first = np.unique(keys, return_index=True)
    return np.sort(first).astype(np.int64)


def overlap(train: TokenTable, evaluation: TokenTable) -> list[tuple[int, int]]:
    """(train row, eval row) for every train row that says what an evaluation row says, with its first such row."""
    ours, theirs = train.signatures, evaluation.signatures
    if ours is not None and theirs is not None:
        both = clusters(np.concatenate([ours, theirs]))
        ours_keys: npt.NDArray[Any] = both[: len(ours)]
        theirs_keys: npt.NDArray[Any] = both[len(ours) :]
    else:
        ours_keys, theirs_keys = train.loose, evaluation.loose
    known, first = np.unique(theirs_keys, return_index=True)
    if not len(known):
        return []
    at = np.minimum(np.searchsorted(known, ours_keys), len(known) - 1)
    return [(int(row), int(first[at[row]])) for row in np.flatnonzero(known[at] == ours_keys)]


def weighted(rows: Indices, *, sources: Any, weights: Sequence[float], seed: int, mixing: Mixing = "repeat") -> Indices:
    """Repeat or thin out the rows of each source by its weight, and spread every source evenly over the whole.

    Args:
        rows: row numbers.
        sources: the source of every row of the table (indexed by row number).
        weights: the weight of every source. `repeat`: 2.5 is every row twice and a random half once more;
            `proportional`: shares of the mixture, which is as small as it can be with no row of any source left out.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    own_rows = [rows[sources[rows] == number] for number in range(len(weights))]
    factors = list(weights)
    if mixing == "proportional":
        total = max((len(own) / weight for own, weight in zip(own_rows, weights, strict=True)), default=0)
        factors = [weight * total / max(1, len(own)) for own, weight in zip(own_rows, weights, strict=True)]
    parts = []
    for own, factor in zip(own_rows, factors, strict=True):
        whole, rest = int(factor + 1e-9), max(0.0, factor - int(factor + 1e-9))
        extra = round(rest * len(own))
        if whole == 0 and extra == 0 and len(own):
            extra = 1
        picked = np.sort(generator.permutation(len(own))[:extra])
        parts.append(np.concatenate([np.tile(own, whole), own[picked]]))
    return interleaved(parts)


def interleaved(parts: Sequence[Indices]) -> Indices:
    """All parts in one, each evenly spread: with 2 and 4 rows, b a b b a b. Equal places: the earlier part first."""
    if not parts:
        return np.empty(0, dtype=np.int64)
    places = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    found: Indices = np.concatenate(parts)[np.argsort(places, kind="stable")]
    return found
