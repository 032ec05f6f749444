"""Squared ReLU in plain PyTorch. See ``dropforge_kernels.ops.relu_squared``."""

from __future__ import annotations

import torch


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 in fp32 or wider, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.relu(x.to(wide)).square().to(x.dtype)
