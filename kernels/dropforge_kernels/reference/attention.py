"""Attention in plain PyTorch: every case, with the whole score matrix. See ``dropforge_kernels.ops.attention``."""

from __future__ import annotations

import torch


def visible(
    tokens: int, *, causal: bool, window: int | None, cu_seqlens: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """(S, S) booleans: which key each query may look at."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.to(position.dtype), position, right=True)
        mask &= document[:, None] == document[None, :]
    return mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v with products in the inputs' dtype and the softmax in fp32 or wider, as eager models
    do.

    A sink is one more column of scores whose probability goes nowhere.
    """
    packed = q.dim() == 3
    if packed:
        q, k, v = (t[None] for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, S, D)
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(q.shape[2], causal=causal, window=window, cu_seqlens=cu_seqlens, device=q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1)[..., : q.shape[2]].to(q.dtype)
    out = (weights @ v).transpose(1, 2)
    return out[0] if packed else out
