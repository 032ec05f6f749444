"""SwiGLU in plain PyTorch. See ``dropforge_kernels.ops.swiglu`` for formulas and arguments."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """silu(gate) * up in fp32 or wider, rounded once; ``inplace`` is a permission that plain PyTorch does not
    need.
    """
    return (silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu_packed(gate_up: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """swiglu of the two halves of the last dimension."""
    return swiglu(*gate_up.chunk(2, -1))


def swiglu_clamped(
    gate_up: torch.Tensor,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    interleaved: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """gpt-oss's clamped activation."""
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, -1)
    gate, up = _wide(gate).clamp(max=limit), _wide(up).clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(gate_up.dtype)


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, product: bool = False, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dgate, dup, h or None), written into gate, up and dh when ``inplace``."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        h = swiglu(*leaves)
    dgate, dup = torch.autograd.grad(h, leaves, dh)
    h = h.detach() if product else None
    if inplace:
        dgate, dup = gate.copy_(dgate), up.copy_(dup)
        h = dh.copy_(h) if product else None
    return dgate, dup, h
