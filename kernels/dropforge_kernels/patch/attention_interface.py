"""Packed attention for every transformers model that goes through transformers' attention interface.

    with packed_attention(model):          # its attention implementation is "dropforge" inside the block
        model(input_ids=..., position_ids=..., cu_seq_lens_q=..., max_length_q=..., ...)

Rows with ``cu_seq_lens_q`` are documents laid end to end: each sees itself alone (``ops.attention``). Rows without a
mask are plain causal ones. What has a mask, a cache or dropout (evaluation of padded batches, generation) goes the way
of transformers' "sdpa". Names of the arguments are transformers'.

Legend: B batch, H query heads, G key-value heads, S queries, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dropforge_kernels import ops
from dropforge_kernels.patch.spec import PatchError

NAME = "dropforge"
WIDEST = 256
"""Head width up to which ``ops.packed_attention`` works."""


def register_attention() -> str:
    """Makes the name known to transformers; calling it again changes nothing. Returns the name."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Runs the block with the interface in every part of ``model`` (bare or inside a wrapper); puts the old one back.

    Raises PatchError when the model's own code calls no attention interface.
    """
    register_attention()
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise PatchError(f"{type(model).__name__} holds no transformers model")
    before = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    if inner.config._attn_implementation != NAME:
        raise PatchError(f"{type(inner).__name__} does not let its attention be chosen, so documents cannot be packed")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: torch.Tensor | None = None, **others: Any
) -> torch.Tensor | None:
    """No mask for rows without padding and cache, whatever their positions: documents are told by cu_seq_lens.

    Otherwise what "sdpa" gets: booleans (B, 1, S, K).
    """
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **others)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, S, D), key and value (B, G, K, D) -> (B, S, H, D) and no weights. Packed rows have B = 1.

    s_aux: (H,) learned sinks. cu_seq_lens_q (documents + 1,) int32, max_length_q their longest length or more.
    Raises ValueError for dropout on packed rows, which no backend here has.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    packed = cu_seq_lens_q is not None and attention_mask is None
    if packed and dropout:
        raise ValueError("attention: packed rows cannot have attention dropout; set attention_dropout to 0")
    if attention_mask is not None or dropout or query.shape[2] != key.shape[2]:
        if softcap is None and s_aux is None:
            out: torch.Tensor = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal
            )[0]
            return out, None
        return _masked(query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {
        "causal": causal, "scale": scaling, "window": sliding_window, "softcap": softcap or None, "sinks": s_aux,
    }  # fmt: skip
    if cu_seq_lens_q is None:
        return ops.attention(q, k, v, **options), None
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    if causal and s_aux is None and shape[-1] <= WIDEST:
        bounds = ops.document_bounds(cu_seq_lens_q, q.shape[0], validate=False)
        out = ops.packed_attention(q, k, v, bounds, scale=scaling, window=sliding_window, softcap=softcap or None)
        return out.view(shape), None
    out = ops.attention(q, k, v, cu_seqlens=cu_seq_lens_q, max_seqlen=max_length_q, validate=False, **options)
    return out.view(shape), None


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    scaling: float | None, softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Scores formed in full: soft-capped scores and sinks have no masked kernel in torch. mask: booleans, or None for
    queries that see every key (a decoding step).
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()
