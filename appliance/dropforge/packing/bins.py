"""Bin packing in decreasing order: into the first bin that has room, or into the emptiest of a fixed number."""

from __future__ import annotations

import heapq

import numpy as np


def first_fit_decreasing(lengths: np.ndarray, *, budget: int, most: int) -> list[np.ndarray]:
    """Positions of the items of each bin: the longest item first, each into the first bin it fits. Few bins.

    Items of equal length keep their order. An item longer than the budget gets a bin of its own.

    Args:
        lengths: (items,) integers.
        budget: sum of lengths that a bin holds.
        most: items that a bin holds.

    Source: Johnson 1973; at most 11/9 of the fewest bins possible.
    """
    free = np.zeros(len(lengths), dtype=np.int64)
    bins: list[list[int]] = []
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        at = int(np.argmax(free[: len(bins)] >= length)) if bins else 0
        if not bins or free[at] < length:
            at = len(bins)
            bins.append([])
            free[at] = max(budget, length)
        bins[at].append(int(item))
        free[at] = free[at] - length if len(bins[at]) < most else -1
    return [np.array(items, dtype=np.int64) for items in bins]


def emptiest_first_decreasing(
    lengths: np.ndarray, *, bins: int, budget: int, most: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """(positions of the items of each bin, positions that found no room): the longest first, each into the emptiest.

    All bins come out alike: about as many items, as long ones, as full. That suits batches of one fixed shape.
    Arguments as above; every length is at most the budget.
    """
    heap = [(-budget, number) for number in range(bins)]
    chosen: list[list[int]] = [[] for _ in range(bins)]
    left: list[int] = []
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        if not heap or -heap[0][0] < length:
            left.append(int(item))
            continue
        free, number = heap[0]
        chosen[number].append(int(item))
        if len(chosen[number]) < most:
            heapq.heapreplace(heap, (free + length, number))
        else:
            heapq.heappop(heap)
    return [np.array(items, dtype=np.int64) for items in chosen if items], np.array(left, dtype=np.int64)
