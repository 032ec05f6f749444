"""Norm of every head of q and k, alone or before RoPE, in plain PyTorch. See ``dropforge_kernels.ops.qk_norm``."""

from __future__ import annotations

import torch

from dropforge_kernels.reference.rms_norm import rms_norm
from dropforge_kernels.reference.rope import rope


def qk_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    rounding: str = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of every head of q and of k."""
    flavour = {"eps": eps, "offset": offset, "rounding": rounding}
    return rms_norm(q, q_weight, **flavour), rms_norm(k, k_weight, **flavour)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounding: str = "llama",
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rope(qk_norm(q, k)); the normed values are rounded to their dtype between the two, as separate modules
    would.
    """
    q, k = qk_norm(q, k, q_weight, k_weight, eps=eps, offset=offset, rounding=rounding)
    return rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
