"""Which documents each optimizer step sees, and in which micro-batches: decided by lengths, seed and epoch alone.

Three modes:

    documents   a step sees the documents that an unpacked trainer's step would see (accelerate's random order, the
                same number of them), packed into as few buckets as they fit. Same loss curve as without packing.
    rows        a step sees a number of full buckets. Documents are packed within windows of the random order; what
                finds no room goes to the next window, and the buckets of a window are shuffled.
    unpacked    as documents, but a micro-batch holds a fixed number of documents, without padding between them.

Nothing is kept between steps: (epoch, step) is the whole state, so a resumed run continues the exact order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from dropforge.packing.bins import emptiest_first_decreasing, first_fit_decreasing
from dropforge.packing.shapes import Buckets, BucketShape

WINDOW_BUCKETS = 64
"""Buckets of a window of mode rows: enough for about 99% filling, few enough that the order stays random."""

SPARE = 256
"""A full bucket of mode rows leaves one part of so many free on purpose."""


class PackingMode(StrEnum):
    """What a step is made of; see the top of this file."""

    DOCUMENTS = "documents"
    ROWS = "rows"
    UNPACKED = "unpacked"


@dataclass(frozen=True)
class Bucket:
    """One micro-batch: its shape and the numbers of its documents."""

    shape: BucketShape
    documents: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """The plan of every epoch.

    Args:
        lengths, counted: (documents,) tokens and counted targets of each.
        mode: see the top of this file.
        per_step: documents of a step (modes documents and unpacked), or buckets of a step (mode rows).
        per_micro: documents of a micro-batch in mode unpacked.
        buckets: the ladder of shapes.
        seed: of the order; epoch e is drawn with seed + e, as accelerate's seedable sampler does.
    """

    lengths: np.ndarray
    counted: np.ndarray
    mode: PackingMode
    per_step: int
    buckets: Buckets
    seed: int
    per_micro: int = 1

    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        items = len(self._filled_rows(0)) if self.mode is PackingMode.ROWS else len(self.lengths)
        return -(-items // self.per_step)

    def epoch(self, epoch: int, *, steps: int | None = None) -> list[list[Bucket]]:
        """The buckets of every step. steps: what ``steps()`` gave, so that it is not planned again."""
        if self.mode is PackingMode.ROWS:
            filled = self._filled_rows(epoch)
            steps = steps or self.steps()
            # Another order fills a few buckets more or less; every epoch has the same number of steps.
            edges = [len(filled) * step // steps for step in range(steps + 1)]
            groups = [filled[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
        else:
            order = self._order(epoch)
            groups = [self._micro_batches(order[a : a + self.per_step]) for a in range(0, len(order), self.per_step)]
        return [[self.bucket(documents) for documents in group] for group in groups]

    def _order(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.lengths), generator=generator).numpy()

    def _micro_batches(self, documents: np.ndarray) -> list[np.ndarray]:
        if self.mode is PackingMode.UNPACKED:
            return [documents[a : a + self.per_micro] for a in range(0, len(documents), self.per_micro)]
        return self._packed(documents)

    def _packed(self, documents: np.ndarray) -> list[np.ndarray]:
        bins = first_fit_decreasing(self.lengths[documents], budget=self.buckets.budget, most=self.buckets.most)
        return [documents[np.sort(items)] for items in bins]  # in the order drawn, not by length

    def _filled_rows(self, epoch: int) -> list[np.ndarray]:
        order = self._order(epoch)
        mean = max(1.0, float(self.lengths.mean()))
        window = max(1, int(WINDOW_BUCKETS * self.buckets.budget / mean))
        random = np.random.default_rng((self.seed, epoch))
        rows: list[np.ndarray] = []
        carried = order[:0]
        for start in range(0, len(order), window):
            full, carried = self._full_rows(np.concatenate((carried, order[start : start + window])))
            rows += [full[i] for i in random.permutation(len(full))]
        return rows + self._packed(carried)

    def _full_rows(self, documents: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """(full buckets, documents that are left). A document longer than the budget is a bucket of its own."""
        lengths, budget = self.lengths[documents], self.buckets.budget
        own = [documents[i : i + 1] for i in np.flatnonzero(lengths > budget)]
        documents = documents[lengths <= budget]
        lengths = self.lengths[documents]
        bins = int(lengths.sum() // budget)
        if not bins:
            return own, documents
        # What is left is the end of the random order, not the shortest: those would pile up late in the epoch. A little
        # room in every bucket lets nearly all of the others in.
        room = bins * (budget - budget // SPARE)
        taken = int(np.searchsorted(np.cumsum(lengths), room, side="right"))
        packed, left = emptiest_first_decreasing(lengths[:taken], bins=bins, budget=budget, most=self.buckets.most)
        rest = np.concatenate((documents[np.sort(left)], documents[taken:]))
        return own + [documents[np.sort(items)] for items in packed], rest

    def bucket(self, documents: np.ndarray) -> Bucket:
        """These documents in the smallest shape that holds them."""
        lengths = self.lengths[documents]
        shape = self.buckets.shape(
            tokens=int(lengths.sum()),
            documents=len(documents),
            longest=int(lengths.max()),
            counted=int(self.counted[documents].sum()),
        )
        return Bucket(shape, documents)
