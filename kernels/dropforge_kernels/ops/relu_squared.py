"""Squared ReLU, the activation of MLPs without a gate (Nemotron, Arcee, nanochat), one launch each way.

Legend: R rows (all leading dimensions of x), I row width. Contiguous tensors are walked as a single row.

Forward:   h = max(x, 0)^2
Backward:  dx = 2 max(x, 0) dh
Source: So et al. 2021 (arXiv 2109.08668).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._common import as_rows, register

OP = "relu_squared"
BLOCK, WARPS = 1024, 4
"""8 elements a thread, as measured for the gated activations."""


@triton.jit
def _positive(x):
    """max(x, 0) that keeps NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit(do_not_specialize=["blocks"])
def relu_squared_forward_kernel(x_ptr, out_ptr, x_stride, width, blocks, BLOCK: tl.constexpr):
    """h for BLOCK elements of one row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _positive(tl.load(x_ptr + row * x_stride + col, mask=col < width, other=0.0).to(tl.float32))
    tl.store(out_ptr + row * width + col, (x * x).to(out_ptr.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["blocks"])
def relu_squared_backward_kernel(dh_ptr, x_ptr, dx_ptr, dh_stride, x_stride, width, blocks, BLOCK: tl.constexpr):
    """dx for BLOCK elements of one row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _positive(tl.load(x_ptr + row * x_stride + col, mask=col < width, other=0.0).to(tl.float32))
    dh = tl.load(dh_ptr + row * dh_stride + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * width + col, (2.0 * x * dh).to(dx_ptr.dtype.element_ty), mask=col < width)


def _cut(*tensors: torch.Tensor) -> tuple[int, int, int]:
    """(programs, row width, blocks a row); contiguous tensors are one long row."""
    width = tensors[0].numel() if all(t.is_contiguous() for t in tensors) else tensors[0].shape[-1]
    blocks = triton.cdiv(width, BLOCK)
    return tensors[0].numel() // width * blocks, width, blocks


def _forward(x: torch.Tensor) -> torch.Tensor:
    x, stride = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        programs, width, blocks = _cut(x)
        relu_squared_forward_kernel[(programs,)](x, out, stride, width, blocks, BLOCK, num_warps=WARPS)
    return out


def _backward(dh: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dh, dh_stride = as_rows(dh)
    x, x_stride = as_rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        programs, width, blocks = _cut(x, dh)
        relu_squared_backward_kernel[(programs,)](dh, x, dx, dh_stride, x_stride, width, blocks, BLOCK, num_warps=WARPS)
    return dx


_FORWARD = register(OP, "(Tensor x) -> Tensor", _forward, lambda x: x.new_empty(x.shape))
_BACKWARD = register(f"{OP}_backward", "(Tensor dh, Tensor x) -> Tensor", _backward, lambda dh, x: x.new_empty(x.shape))


class _ReluSquared(torch.autograd.Function):
    """Eager form: saves x."""

    @staticmethod
    def forward(ctx, x) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    def backward(ctx, dh) -> torch.Tensor:
        return _backward(dh, *ctx.saved_tensors)


_FORWARD.register_autograd(
    lambda ctx, dh: _BACKWARD(dh, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """``torch.nn.functional.relu(x).square()``, fp32 inside, rounded once.

    x: (..., I), bf16, fp16 or fp32, rows at any single stride (other layouts are copied first). Returns h like x,
    contiguous. Nothing is in place. Saved for backward: x. Raises TypeError or ValueError for a wrong dtype or a
    scalar.
    """
    checks.check_tensor(OP, "x", x)
    checks.check_dtype(OP, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have at least one dimension; received a scalar")
    if choose(OP, x).backend is Backend.REFERENCE:
        return reference.relu_squared(x)
    if torch.compiler.is_compiling():
        return _FORWARD(x)
    return _ReluSquared.apply(x)
