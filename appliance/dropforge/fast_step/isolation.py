"""A look at the model itself before anything is packed: do documents of one row leave each other alone?

Attention that takes cu_seq_lens does; a recurrent layer, or attention code of its own, may not. Two short documents are
packed, and one token of the first is changed: not one bit of the second's loss may change, and it must be about the
loss that the second has alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dropforge_kernels.patch.attention_interface import packed_attention
from dropforge_kernels.patch.spec import PatchError
from torch import nn

from dropforge.packing.collate import collate, model_inputs
from dropforge.packing.plan import Bucket
from dropforge.packing.rows import IGNORED, TokenRows
from dropforge.packing.shapes import Buckets

LENGTH = 64


def packing_obstacle(model: nn.Module) -> str:
    """Why documents of one row would not be alone in this model; empty when they are. Leaves the model as it was."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        config: Any = model.config
        # Trained in full, weights are fp32 and train under autocast; attention has no fast backend for fp32.
        cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with packed_attention(model), torch.no_grad(), cast:
            return _compare(model, config.get_text_config().vocab_size, device)
    except (TypeError, PatchError) as error:
        return f"the model does not take packed rows: {error}"
    finally:
        model.train(training)


def _compare(model: nn.Module, vocabulary: int, device: torch.device) -> str:
    random = np.random.default_rng(0)
    low = min(16, vocabulary - 1)
    first, second = (random.integers(low, vocabulary, LENGTH).astype(np.int32) for _ in range(2))
    other = first.copy()
    other[LENGTH // 2] = low + (other[LENGTH // 2] - low + 1) % (vocabulary - low)
    packed, changed = (_loss(model, [lead, second], device) for lead in (first, other))
    alone = _loss(model, [second], device)
    if not torch.equal(packed, changed):
        return "changing a document changes the loss of its neighbour"
    tolerance = 1e-4 if device.type == "cpu" and next(model.parameters()).dtype is torch.float32 else 3e-2
    if not torch.allclose(packed, alone, rtol=tolerance, atol=tolerance):
        return f"a document's loss is {float(alone):.5f} alone and {float(packed):.5f} beside another"
    return ""


def _loss(model: nn.Module, documents: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Of the last document."""
    ids = np.concatenate(documents)
    starts = np.concatenate(([0], np.cumsum([len(d) for d in documents])))
    targets = np.full(len(ids), IGNORED, dtype=np.int32)
    targets[starts[-2] : -1] = ids[starts[-2] + 1 :]
    rows = TokenRows(ids, targets, starts)
    shape = Buckets(budget=4 * LENGTH, most=4).shape(tokens=len(ids), documents=2, longest=LENGTH, counted=LENGTH)
    batch = collate(rows, Bucket(shape, np.arange(len(documents))), pad=0, pin=False, items=LENGTH - 1)
    outputs: Any = model(**model_inputs(batch.flat.to(device), shape))
    loss: torch.Tensor = outputs.loss
    return loss.float()
