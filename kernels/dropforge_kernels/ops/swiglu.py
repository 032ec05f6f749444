"""SwiGLU: silu(gate) * up, from two tensors or one packed tensor, and the clamped form of gpt-oss.

Forward:   h = gate * sigmoid(gate) * up
Backward:  dgate = dh * up * s * (1 + gate * (1 - s)), dup = dh * gate * s, with s = sigmoid(gate)
Clamped:   g = min(gate, limit), u = clamp(up, -limit, limit), s = sigmoid(alpha * g), h = g * s * (u + 1)
           dgate = dh * (u + 1) * s * (1 + alpha * g * (1 - s)) where gate <= limit, dup = dh * g * s where |up| <=
           limit
Source: Shazeer 2020 (arXiv 2002.05202); the clamped form is gpt-oss's published definition.
"""

from __future__ import annotations

import torch

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._glu import CLAMPED, SILU, launch_backward
from dropforge_kernels.ops._glu_autograd import PACKED, PAIR, GatedPacked, GatedPair, check_packed, check_pair


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """``silu(gate) * up``.

    gate, up: (..., I), one shape and dtype (bf16, fp16, fp32), rows at any single stride each (other layouts are
    copied). Returns h like gate, contiguous; fp32 inside, rounded once. Saved for backward: gate and up. ``inplace``:
    backward writes dgate and dup into gate and up, so that it needs no memory; nobody else may need them, and it can
    run only once (a second run raises). Under torch.compile ``inplace`` is ignored.
    Raises TypeError or ValueError for wrong dtypes, shapes or devices.
    """
    check_pair("swiglu", gate, up)
    if choose("swiglu", gate, up).backend is Backend.REFERENCE:
        return reference.swiglu(gate, up)
    if torch.compiler.is_compiling():
        return PAIR(gate, up, SILU, 0.0, 0.0)
    return GatedPair.apply(gate, up, SILU, 0.0, 0.0, inplace)


def swiglu_packed(gate_up: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """``swiglu(*gate_up.chunk(2, -1))`` for (..., 2 I), whose gradient is one tensor too. Otherwise as ``swiglu``."""
    check_packed("swiglu_packed", gate_up)
    if choose("swiglu_packed", gate_up).backend is Backend.REFERENCE:
        return reference.swiglu_packed(gate_up)
    if torch.compiler.is_compiling():
        return PACKED(gate_up, SILU, 0.0, 0.0, False)
    return GatedPacked.apply(gate_up, SILU, 0.0, 0.0, False, inplace)


def swiglu_clamped(
    gate_up: torch.Tensor,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    interleaved: bool = True,
    inplace: bool = False,
) -> torch.Tensor:
    """gpt-oss's activation of (..., 2 I): ``g * sigmoid(alpha * g) * (u + 1)`` with clamped g and u (see the file).

    interleaved: gate and up alternate along the last dimension (gpt-oss); False: gate first, then up. At the clamp's
    edge the gradient passes, beyond it is zero, as torch.clamp does. The rest as in ``swiglu``.
    """
    check_packed("swiglu_clamped", gate_up)
    checks.check_positive("swiglu_clamped", "limit", limit)
    if choose("swiglu_clamped", gate_up).backend is Backend.REFERENCE:
        return reference.swiglu_clamped(gate_up, alpha=alpha, limit=limit, interleaved=interleaved)
    if torch.compiler.is_compiling():
        return PACKED(gate_up, CLAMPED, alpha, limit, interleaved)
    return GatedPacked.apply(gate_up, CLAMPED, alpha, limit, interleaved, inplace)


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, product: bool = False, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The backward launch without autograd, for hand-written blocks: (dgate, dup, h or None).

    dh, gate, up: (..., I), one shape and dtype. ``product`` also returns h = silu(gate) * up from the same pass, for
    a down projection's adapter gradient, so that the forward need not save h. ``inplace`` (all three contiguous)
    writes dgate into gate, dup into up and h into dh: no memory at all.
    Raises TypeError or ValueError for wrong dtypes, shapes or layouts.
    """
    check_pair("swiglu_backward", gate, up)
    checks.check_same_shape("swiglu_backward", "dh", dh, "gate", gate)
    checks.check_same_dtype("swiglu_backward", "dh", dh, "gate", gate)
    if inplace and not (dh.is_contiguous() and gate.is_contiguous() and up.is_contiguous()):
        raise ValueError("swiglu_backward: inplace needs contiguous dh, gate and up")
    if choose("swiglu_backward", dh, gate, up).backend is Backend.REFERENCE:
        return reference.swiglu_backward(dh, gate, up, product=product, inplace=inplace)
    if inplace:
        dgate, dup, h = gate, up, dh if product else None
    else:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        h = torch.empty(dh.shape, dtype=dh.dtype, device=dh.device) if product else None
    launch_backward(dh, gate, up, dgate, dup, SILU, product=h)
    return dgate, dup, h
