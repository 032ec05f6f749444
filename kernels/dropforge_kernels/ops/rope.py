"""Rotary position embedding of q and k in one launch.

Legend: B batch, S tokens of a row, T = B * S, H heads, D head width, P rotated pairs (2 * P <= D), N table rows.

Forward:   (a, b) of pair i at position p becomes (a cos - b sin, b cos + a sin) with cos, sin of table row p, column
i Backward:  the same with -sin
Source: Su et al. 2021 (arXiv 2104.09864); the half-split pairing is GPT-NeoX's, the interleaved one the paper's.
"""

from __future__ import annotations

import torch

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._common import register
from dropforge_kernels.ops._heads import launch_forward

POSITION_DTYPES = frozenset({torch.int32, torch.int64})


def _forward_op(q, k, cos, sin, positions, interleaved, sign):
    return launch_forward(q, k, table=(cos, sin), positions=positions, interleaved=interleaved, sign=sign)


def _fake(q, k, cos, sin, positions, interleaved, sign):
    return q.new_empty(q.shape), k.new_empty(k.shape)


_FORWARD = register(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, int sign) -> (Tensor, Tensor)",
    _forward_op,
    _fake,
)


class _Rope(torch.autograd.Function):
    """Eager form: saves cos, sin and positions, nothing of q or k."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved, inplace) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.inplace = interleaved, inplace
        return launch_forward(q, k, table=(cos, sin), positions=positions, interleaved=interleaved, inplace=inplace)

    @staticmethod
    def backward(ctx, dq, dk) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        inplace = ctx.inplace and dq.stride(-1) == 1 and dk.stride(-1) == 1
        dq, dk = launch_forward(
            dq, dk, table=(cos, sin), positions=positions, interleaved=ctx.interleaved, inplace=inplace, sign=-1
        )
        return dq, dk, None, None, None, None, None


def _setup(ctx, inputs, output):
    _, _, cos, sin, positions, interleaved, sign = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.interleaved, ctx.sign = interleaved, sign


def _compiled_backward(ctx, dq, dk):
    cos, sin, positions = ctx.saved_tensors
    return *_FORWARD(dq, dk, cos, sin, positions, ctx.interleaved, -ctx.sign), None, None, None, None, None


_FORWARD.register_autograd(_compiled_backward, setup_context=_setup)


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor) -> None:
    """Raises unless q and k are (B, S, H, D) or (T, H, D) of one dtype, with the same tokens and head width."""
    checks.check_dtype(op, "q", q)
    checks.check_same_dtype(op, "k", k, "q", q)
    if q.dim() not in (3, 4) or k.dim() != q.dim():
        raise ValueError(
            f"{op}: q and k must both be (B, S, H, D) or (T, H, D); received {tuple(q.shape)} and {tuple(k.shape)}"
        )
    checks.check_shape(op, "k", k, (*q.shape[:-2], "H", q.shape[-1]))
    checks.check_width(op, "q", q.shape[-1], 1024)
    if q.shape[-2] < 1 or k.shape[-2] < 1:
        raise ValueError(f"{op}: q and k need at least one head; received {tuple(q.shape)} and {tuple(k.shape)}")


def check_table(
    op: str, q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Raises unless the tables and positions fit q; returns them with contiguous rows (and one stride for both)."""
    checks.check_dtype(op, "cos", cos)
    checks.check_same_dtype(op, "sin", sin, "cos", cos)
    checks.check_ndim(op, "cos", cos, 2)
    checks.check_same_shape(op, "sin", sin, "cos", cos)
    if not 1 <= cos.shape[1] <= q.shape[-1] // 2:
        raise ValueError(
            f"{op}: cos must have between 1 and {q.shape[-1] // 2} columns (rotated pairs of width {q.shape[-1]}); "
            f"received {cos.shape[1]}"
        )
    tokens = q.shape[:-2].numel()
    if positions is None:
        checks.check_shape(op, "cos", cos, (tokens, "P"))
    else:
        checks.check_dtype(op, "positions", positions, POSITION_DTYPES)
        if positions.numel() != tokens or positions.dim() > 2:
            expected = tuple(q.shape[:-2])
            raise ValueError(f"{op}: positions must have shape {expected}; received {tuple(positions.shape)}")
        positions = positions.contiguous()
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, positions


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
    """Rotates the first 2 * P features of every head of q and k; the others pass through.

    Args:
        q, k: (B, S, H, D) or (T, H, D), bf16, fp16 or fp32; H may differ (grouped heads), D up to 1,024. Any strides
            with a contiguous last dimension (slices of a joint projection, transposed attention layouts).
        cos, sin: (N, P): each angle once, not repeated for both halves; any of those dtypes, fp32 recommended. Tables
            are constants here: no gradient reaches them.
        positions: int32 or int64, (B, S) or (T,): the table row of each token (packing: positions restart at each
            document). None: table row = token, so N = T. A position outside the table gives NaN, on purpose.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + P).
        inplace: overwrite q and k, and in backward their incoming gradients. The caller promises that nobody else
            needs any of the four. Under torch.compile it is ignored.

    Returns (q, k): new contiguous tensors, or q and k themselves. Products in fp32, rounded once. Saved for backward:
    the tables and positions. Offsets are 64-bit, so tensors may pass 2^31 elements.
    Raises TypeError or ValueError for wrong dtypes, shapes or devices.
    """
    check_heads("rope", q, k)
    cos, sin, positions = check_table("rope", q, cos, sin, positions)
    if choose("rope", q, k, cos, sin, positions).backend is Backend.REFERENCE:
        return reference.rope(q, k, cos, sin, positions=positions, interleaved=interleaved)
    if torch.compiler.is_compiling():
        return _FORWARD(q, k, cos, sin, positions, interleaved, 1)
    return _Rope.apply(q, k, cos, sin, positions, interleaved, inplace)
