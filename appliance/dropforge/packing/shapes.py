"""The few fixed shapes of a packed micro-batch: what a captured CUDA graph is made for.

Every number that a kernel's launch depends on is rounded up to one of few values, so that any packing meets a graph
that is there already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EIGHTHS = (1, 2, 3, 4, 6, 8)
"""Sizes of a bucket in eighths of the budget: a last, half-full bucket wastes at most a third of itself."""
SHORTEST_BOUND = 512
SMALL = 4096
"""Buckets up to this size have one bound of lengths, their own: empty tiles of attention cost nothing there."""
PADDING_DOCUMENTS = 8
"""Padding at a bucket's end is laid out as this many documents at most, so that it keeps to the bound of lengths."""


@dataclass(frozen=True, kw_only=True, order=True)
class BucketShape:
    """A micro-batch's shape."""

    tokens: int
    """Length of the row, padding included."""
    documents: int
    """cu_seqlens has one entry more; unused ones repeat the end."""
    longest: int
    """Upper bound of the document lengths: attention launches for it."""
    counted: int
    """Upper bound of the targets that count: the head computes no more rows."""

    @property
    def words(self) -> int:
        """64-bit words of the flat buffer: ids, positions, targets, cu_seqlens (32 bit), targets of the step."""
        return 3 * self.tokens + (self.documents + 2) // 2 + 1


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The ladder of shapes under one token budget.

    Args:
        budget: tokens of the largest ordinary bucket. A document longer than that gets a multiple of it.
        most: documents that a full bucket may hold.
    """

    budget: int
    most: int

    def shape(self, *, tokens: int, documents: int, longest: int, counted: int) -> BucketShape:
        """The smallest shape that holds so many tokens in so many documents."""
        size, slots = self._size(tokens, documents)
        bound = SHORTEST_BOUND if size > SMALL else size
        while bound < max(longest, -(-(size - tokens) // PADDING_DOCUMENTS)):
            bound *= 4
        # Of small buckets a training meets few: each number more is a graph that hardly anybody replays.
        part = -(-size // (4 if size > SMALL else 2))
        return BucketShape(
            tokens=size,
            documents=slots,
            longest=min(bound, size),
            counted=min(size, max(1, -(-counted // part)) * part),
        )

    def _size(self, tokens: int, documents: int) -> tuple[int, int]:
        for eighths in EIGHTHS:
            size = self.budget * eighths // 8
            slots = max(PADDING_DOCUMENTS, self.most * eighths // 8)
            if tokens <= size and documents <= slots:
                return size, slots + PADDING_DOCUMENTS
        return -(-tokens // self.budget) * self.budget, max(self.most, documents) + PADDING_DOCUMENTS


def buckets_for(lengths: np.ndarray, *, budget: int) -> Buckets:
    """A ladder for documents of these lengths: room for twice the documents that a full bucket holds on average.

    Attention launches for every slot, used or not, so there should not be many more than needed.
    """
    mean = max(1.0, float(lengths.mean())) if len(lengths) else 1.0
    most = int(2 * budget / mean) + 1
    return Buckets(budget=budget, most=min(budget, max(PADDING_DOCUMENTS, -(-most // 8) * 8)))
