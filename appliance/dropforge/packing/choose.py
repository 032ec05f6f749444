"""Whether to pack, and into what: from the lengths alone, with the reason in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dropforge.packing.plan import PackingMode, PackingPlan
from dropforge.packing.rows import TokenRows
from dropforge.packing.shapes import buckets_for

BUDGET = 8192
"""Tokens of a full bucket: enough to keep a large GPU busy with a small model."""
STEP = 128
"""Budgets are multiples of eight times this, so that every bucket is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class PackingChoice:
    """The order and the shapes of a training, and why."""

    plan: PackingPlan
    reason: str


def choose_packing(
    rows: TokenRows,
    *,
    asked: str | bool = "auto",
    documents_per_step: int,
    per_micro: int,
    budget: int | None = None,
    rows_per_step: int | None = None,
    seed: int,
) -> PackingChoice:
    """The plan for a data set.

    Args:
        rows: the documents.
        asked: "auto" packs the documents of each step where that saves micro-batches; True fills whole buckets; False
            keeps to micro-batches of ``per_micro`` documents, without padding between them.
        documents_per_step: of an optimizer step. With True it is so on average.
        per_micro: documents of an unpacked micro-batch.
        budget: tokens of a full bucket; None: BUDGET, or the longest document if that is longer.
        rows_per_step: buckets of a step with True, when the caller counts in buckets (TRL does).
        seed: of the order.

    Raises ValueError for an empty data set.
    """
    lengths = rows.lengths
    if not len(lengths):
        raise ValueError("there is no document to pack")
    mean, longest = float(lengths.mean()), int(lengths.max())
    full = _rounded(max(budget or BUDGET, longest))
    if asked is True:
        per_step = rows_per_step or max(1, round(documents_per_step * mean / full))
        reason = (
            f"asked for; a step is {per_step} buckets of {full} tokens, about {per_step * full / mean:.0f} documents"
        )
        return _choice(rows, PackingMode.ROWS, per_step, 1, full, seed, reason)
    text = f"documents have {mean:.0f} tokens on average, a bucket {full}"
    if asked == "auto" and mean * 2 <= full and documents_per_step > 1:
        reason = f"{text}; the {documents_per_step} documents of a step share buckets, which changes no result"
        return _choice(rows, PackingMode.DOCUMENTS, documents_per_step, 1, full, seed, reason)
    why = "not asked for" if asked is False else "a step is one document" if documents_per_step == 1 else f"{text}"
    full = _rounded(per_micro * longest)
    reason = f"off: {why}; micro-batches of {per_micro} documents without padding between them"
    return _choice(rows, PackingMode.UNPACKED, documents_per_step, per_micro, full, seed, reason)


def _rounded(tokens: int) -> int:
    return max(1, -(-tokens // (8 * STEP))) * 8 * STEP


def _choice(
    rows: TokenRows, mode: PackingMode, per_step: int, per_micro: int, budget: int, seed: int, reason: str
) -> PackingChoice:
    lengths = rows.lengths
    plan = PackingPlan(
        lengths=lengths,
        counted=np.asarray(rows.counted),
        mode=mode,
        per_step=per_step,
        per_micro=per_micro,
        buckets=buckets_for(lengths, budget=budget),
        seed=seed,
    )
    return PackingChoice(plan=plan, reason=f"{mode}: {reason}")
