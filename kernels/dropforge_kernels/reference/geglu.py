"""GeGLU in plain PyTorch. See ``dropforge_kernels.ops.geglu`` for formulas and arguments."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "none", inplace: bool = False) -> torch.Tensor:
    """gelu(gate) * up in fp32 or wider, rounded once; ``inplace`` is a permission that plain PyTorch does not
    need.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (gelu(gate.to(wide), approximate=approximate) * up.to(wide)).to(gate.dtype)
