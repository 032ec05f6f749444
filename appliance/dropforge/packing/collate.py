"""Documents of a bucket into one flat buffer that holds every argument of the model.

Legend: T tokens of the bucket, N document slots. The arguments are transformers' own names:

    input_ids, position_ids, shift_labels   (1, T) int64; positions restart at 0 in each document
    labels                                  the same tensor as shift_labels
    cu_seq_lens_q, cu_seq_lens_k            (N + 1,) int32, filled up with T
    num_items_in_batch                      0-d int64: counted targets of the whole optimizer step
    max_length_q, max_length_k, max_valid   Python integers, bounds that belong to the shape

One buffer is one copy to the GPU; the arguments are views of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dropforge.packing.plan import Bucket
from dropforge.packing.rows import IGNORED, TokenRows
from dropforge.packing.shapes import BucketShape


@dataclass(frozen=True)
class MicroBatch:
    """One bucket on the host."""

    shape: BucketShape
    flat: torch.Tensor
    """(shape.words,) int64, pinned where there is a GPU."""
    bucket: Bucket
    """What it was made of, so that it can be cut into smaller ones."""
    tokens: int
    """Without padding."""


@dataclass(frozen=True)
class StepBatch:
    """All micro-batches of one optimizer step."""

    micro: tuple[MicroBatch, ...]
    tokens: int
    """Without padding."""
    counted: int
    """Targets in the loss: what every micro-batch's sum is divided by."""
    documents: int


def collate_step(rows: TokenRows, buckets: list[Bucket], *, pad: int, pin: bool, counted: np.ndarray) -> StepBatch:
    """The micro-batches of a step. pad: the id of padding. counted: per document, of the whole data set."""
    items = sum(int(counted[bucket.documents].sum()) for bucket in buckets)
    micro = tuple(collate(rows, bucket, pad=pad, pin=pin, items=items) for bucket in buckets)
    return StepBatch(
        micro=micro,
        tokens=sum(batch.tokens for batch in micro),
        counted=items,
        documents=sum(len(bucket.documents) for bucket in buckets),
    )


def collate(rows: TokenRows, bucket: Bucket, *, pad: int, pin: bool, items: int) -> MicroBatch:
    """One bucket. items: counted targets of the whole step."""
    shape = bucket.shape
    flat = torch.empty(shape.words, dtype=torch.int64, pin_memory=pin)
    out = flat.numpy()
    total = shape.tokens
    ids, positions, targets = out[:total], out[total : 2 * total], out[2 * total : 3 * total]
    ends = out[3 * total : -1].view(np.int32)
    ends[:] = total
    ends[0] = at = 0
    for slot, document in enumerate(bucket.documents, start=1):
        start, stop = rows.starts[document], rows.starts[document + 1]
        end = at + int(stop - start)
        ids[at:end] = rows.input_ids[start:stop]
        targets[at:end] = rows.targets[start:stop]
        positions[at:end] = np.arange(end - at)
        ends[slot] = at = end
    tokens = at
    ids[at:], targets[at:] = pad, IGNORED
    slot = len(bucket.documents)
    while at < total:
        end = min(at + shape.longest, total)
        positions[at:end] = np.arange(end - at)
        slot += 1
        ends[slot] = at = end
    out[-1] = max(1, items)
    return MicroBatch(shape, flat, bucket, tokens)


def model_inputs(flat: torch.Tensor, shape: BucketShape) -> dict[str, Any]:
    """The model's arguments as views of a flat buffer, on whatever device it lies."""
    total = shape.tokens
    ids, positions, targets = (flat[i * total : (i + 1) * total].view(1, total) for i in range(3))
    ends = flat[3 * total : -1].view(torch.int32)[: shape.documents + 1]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": targets,
        "shift_labels": targets,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": shape.longest,
        "max_length_k": shape.longest,
        "num_items_in_batch": flat[-1],
        "max_valid": shape.counted,
        "use_cache": False,
    }
