"""RMSNorm in plain PyTorch. See ``dropforge_kernels.ops.rms_norm`` for formulas and arguments."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, *, eps: float, offset: float = 0.0, rounding: str = "llama"
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), in fp32 or wider, returned in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == "llama":
        normed = normed.to(x.dtype)
    if weight is None:
        return normed.to(x.dtype)
    return (normed.to(wide) * (weight.to(wide) + offset)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    rounding: str = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to the dtype of x first."""
    total = x + residual
    return rms_norm(total, weight, eps=eps, offset=offset, rounding=rounding), total
