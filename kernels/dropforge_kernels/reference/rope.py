"""Rotary position embedding of q and k in plain PyTorch. See ``dropforge_kernels.ops.rope``."""

from __future__ import annotations

import torch


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, interleaved: bool
) -> torch.Tensor:
    """Rotates the first 2 * cos.shape[-1] features of x (B, S, H, D) or (T, H, D), in fp32 or wider, rounded once."""
    half = cos.shape[-1]
    tokens = x.shape[:-2]
    if positions is not None:
        cos, sin = cos[positions.reshape(tokens).long()], sin[positions.reshape(tokens).long()]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.reshape(*tokens, 1, half).to(wide) for t in (cos, sin))
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rotated q, rotated k); ``inplace`` is a permission that plain PyTorch does not need."""
    return _rotate(q, cos, sin, positions, interleaved), _rotate(k, cos, sin, positions, interleaved)
