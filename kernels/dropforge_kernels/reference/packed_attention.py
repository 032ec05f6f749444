"""Packed attention in plain PyTorch, with the whole score matrix. See ``dropforge_kernels.ops.packed_attention``."""

from __future__ import annotations

import torch


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Products in the inputs' dtype, the softmax in fp32 or wider."""
    starts, _ = bounds
    place = torch.arange(q.shape[0], device=q.device)
    seen = (place[None, :] >= starts[:, None]) & (place[None, :] <= place[:, None])
    if window is not None:
        seen &= place[:, None] - place[None, :] < window
    group = q.shape[1] // k.shape[1]
    query, key, value = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # (heads, T, D)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).to(q.dtype)
    return (weights @ value).transpose(0, 1).contiguous()
