"""RMSNorm, alone and with the residual addition before it, forward and backward in one launch each.

Legend: R rows (all leading dimensions of x), H row width.

Forward:   s = x (+ residual, rounded to x's dtype)      rstd = 1 / sqrt(mean(s^2) + eps)      n = s * rstd
           y = n * (offset + weight)
Backward:  g = dy * (offset + weight)                    ds = rstd * (g - n * mean(g * n)) (+ gradient of s itself)
           dweight = sum over rows of dy * n             dx = dresidual = ds
Source: Zhang and Sennrich 2019 (arXiv 1910.07467); rounding conventions as in the model definitions of transformers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._common import as_rows, register, row_block, summing_rows
from dropforge_kernels.ops._sum_rows import counter, finish_cut, finish_sum

MAX_WIDTH = 65536
ROUNDINGS = ("llama", "gemma")


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
    x_stride, residual_stride, rows, eps, offset,
    WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, LLAMA: tl.constexpr,
):  # fmt: skip
    """y = s * rstd * (offset + weight) for BLOCK_R rows; statistics and products in fp32. LLAMA rounds s * rstd to
    y's dtype first.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]  # [BLOCK_R, 1]
    col = tl.arange(0, BLOCK_H)[None, :]
    mask = (row < rows) & (col < WIDTH)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * WIDTH + col, x, mask=mask)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)  # [BLOCK_R]
    row_1d = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(rstd_ptr + row_1d, rstd, mask=row_1d < rows)
    y = x * rstd[:, None]
    if LLAMA:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        y = y * (tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32) + offset)
    tl.store(y_ptr + row * WIDTH + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "steps"])
def rms_norm_backward_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, dweight_ptr, counter_ptr,
    dy_stride, ds_stride, s_stride, rows, steps, offset,
    WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_DS: tl.constexpr, HAS_WEIGHT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, STAGES: tl.constexpr,
    SLICES: tl.constexpr, SUM_R: tl.constexpr, SUM_C: tl.constexpr,
):  # fmt: skip
    """dx for ``steps`` blocks of BLOCK_R rows per program, in fp32; the program's sum of dy * n goes to its row of
    ``partial``, and the programs that finish last sum those.
    """
    col = tl.arange(0, BLOCK_H)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32) + offset
    if WEIGHT_GRADIENT:
        total = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    else:
        steps = 1  # one block a program: the loop goes away
    for step in tl.range(0, steps, num_stages=STAGES):
        block = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        row_1d = block * BLOCK_R + tl.arange(0, BLOCK_R)
        row = row_1d[:, None]
        mask = (row < rows) & (col < WIDTH)
        s = tl.load(s_ptr + row * s_stride + col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row_1d, mask=row_1d < rows, other=0.0)[:, None]
        n = s * rstd
        if WEIGHT_GRADIENT:
            total += dy * n
        if HAS_WEIGHT:
            dy = dy * weight
        dx = rstd * (dy - n * (tl.sum(dy * n, axis=1) / WIDTH)[:, None])
        if HAS_DS:
            dx += tl.load(ds_ptr + row * ds_stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * WIDTH + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRADIENT:
        out = tl.arange(0, BLOCK_H)
        base = partial_ptr + tl.program_id(0).to(tl.int64) * WIDTH
        tl.store(base + out, tl.sum(total, axis=0), mask=out < WIDTH)
        finish_sum(partial_ptr, dweight_ptr, counter_ptr, WIDTH, SLICES, SUM_R, SUM_C)


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    llama: bool,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launch alone, without autograd: (y, s, rstd) with s = x when there is no residual and rstd fp32 of shape
    (R,).
    """
    width = x.shape[-1]
    x, x_stride = as_rows(x)
    rows = x.numel() // width
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(rows, dtype=torch.float32)
    total, residual_stride = x, 0
    if residual is not None:
        residual, residual_stride = as_rows(residual)
        total = torch.empty_like(y)
    if rows:
        block_h, block_r, warps = row_block(width, rows, forward=True)
        rms_norm_forward_kernel[(triton.cdiv(rows, block_r),)](
            x, residual, weight, y, total, rstd, x_stride, residual_stride, rows, eps, offset,
            width, block_h, block_r, residual is not None, weight is not None, llama, num_warps=warps,
        )  # fmt: skip
    return y, total, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    weight_gradient: bool,
    ds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The launch alone: (dx, dweight or None); ``ds`` is the gradient that reaches the residual sum directly."""
    width = s.shape[-1]
    dy, dy_stride = as_rows(dy)
    s, s_stride = as_rows(s)
    rows = rstd.numel()
    dx = torch.empty_like(s, memory_format=torch.contiguous_format)
    ds_stride = 0
    if ds is not None:
        ds, ds_stride = as_rows(ds)
    block_h, block_r, warps = row_block(width, rows, forward=False)
    blocks = triton.cdiv(rows, block_r)
    programs, partial, dweight, arrivals, stages = blocks, None, None, None, 1
    if weight_gradient:
        warps, programs, stages, block_r = summing_rows(width, rows, s)
        blocks = triton.cdiv(rows, block_r)
        partial = torch.empty((programs, width), dtype=torch.float32, device=s.device)
        dweight = torch.empty_like(weight) if rows else torch.zeros_like(weight)
        arrivals = counter(s.device)
    if rows:
        rms_norm_backward_kernel[(programs,)](
            dy, ds, s, weight, rstd, dx, partial, dweight, arrivals, dy_stride, ds_stride, s_stride, rows,
            triton.cdiv(blocks, programs), offset, width, block_h, block_r, ds is not None, weight is not None,
            weight_gradient, stages, *finish_cut(s), num_warps=warps,
        )  # fmt: skip
    return dx, dweight


def _forward_op(x, weight, eps, offset, llama):
    y, _, rstd = rms_norm_forward(x, weight, eps, offset, llama)
    return y, rstd


def _add_forward_op(x, residual, weight, eps, offset, llama):
    return rms_norm_forward(x, weight, eps, offset, llama, residual)


def _backward_op(dy, s, weight, rstd, offset, weight_gradient, ds):
    dx, dweight = rms_norm_backward(dy, s, weight, rstd, offset, weight_gradient, ds)
    return dx, dx.new_empty(0) if dweight is None else dweight


def _fake_rows(x):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _forward_fake(x, weight, eps, offset, llama):
    return _fake_rows(x)


def _add_forward_fake(x, residual, weight, eps, offset, llama):
    y, rstd = _fake_rows(x)
    return y, x.new_empty(x.shape), rstd


def _backward_fake(dy, s, weight, rstd, offset, weight_gradient, ds):
    return s.new_empty(s.shape), torch.empty_like(weight) if weight_gradient else s.new_empty(0)


_FORWARD = register(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, float offset, bool llama) -> (Tensor, Tensor)",
    _forward_op,
    _forward_fake,
)
_ADD_FORWARD = register(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool llama) -> (Tensor, Tensor, Tensor)",
    _add_forward_op,
    _add_forward_fake,
)
_BACKWARD = register(
    "rms_norm_backward",
    "(Tensor dy, Tensor s, Tensor? weight, Tensor rstd, float offset, bool weight_gradient, Tensor? ds) "
    "-> (Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)


class _RMSNorm(torch.autograd.Function):
    """Eager form: saves x, weight and rstd."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, llama) -> torch.Tensor:
        y, _, rstd = rms_norm_forward(x, weight, eps, offset, llama)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx, dy) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        return *rms_norm_backward(dy, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1]), None, None, None


class _AddRMSNorm(torch.autograd.Function):
    """Eager form with the residual: saves the sum (which is also an output), weight and rstd."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, llama) -> tuple[torch.Tensor, torch.Tensor]:
        y, total, rstd = rms_norm_forward(x, weight, eps, offset, llama, residual)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, dy, ds) -> tuple[torch.Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return ds, ds, None, None, None, None
        dx, dweight = rms_norm_backward(dy, total, weight, rstd, ctx.offset, ctx.needs_input_grad[2], ds)
        return dx, dx, dweight, None, None, None


def _setup(ctx, inputs, output):
    x, weight, _, offset, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.offset = offset


def _compiled_backward(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    dx, dweight = _BACKWARD(dy, x, weight, rstd, ctx.offset, wanted, None)
    return dx, dweight if wanted else None, None, None, None


def _add_setup(ctx, inputs, output):
    _, _, weight, _, offset, _ = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.offset = offset


def _add_compiled_backward(ctx, dy, ds, _):
    total, weight, rstd = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    dx, dweight = _BACKWARD(dy, total, weight, rstd, ctx.offset, wanted, ds)
    # Two gradients must not be one tensor inside a traced graph.
    return dx, dx.clone(), dweight if wanted else None, None, None, None


_FORWARD.register_autograd(_compiled_backward, setup_context=_setup)
_ADD_FORWARD.register_autograd(_add_compiled_backward, setup_context=_add_setup)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor | None, eps: float, rounding: str) -> None:
    checks.check_dtype(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension; received a scalar")
    checks.check_width(op, "x", x.shape[-1], MAX_WIDTH)
    if weight is not None:
        checks.check_dtype(op, "weight", weight)
        checks.check_shape(op, "weight", weight, (x.shape[-1],))
        if not weight.is_contiguous():
            raise ValueError(f"{op}: weight must be contiguous; received stride {weight.stride()}")
    checks.check_choice(op, "rounding", rounding, ROUNDINGS)
    checks.check_positive(op, "eps", eps)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    rounding: str = "llama",
) -> torch.Tensor:
    """``(x.float() * rsqrt(x.float().pow(2).mean(-1) + eps)) * (offset + weight)`` in the dtype of x.

    Args:
        x: (..., H), bf16, fp16 or fp32, rows at any single stride (other layouts are copied first). H up to 65,536.
        weight: (H,), contiguous, any of those dtypes (fp32 beside bf16 x is fine); None = no weight.
        eps: added to the mean of squares. offset: added to the weight (Gemma: 1.0).
        rounding: "llama" rounds the normalised x to x's dtype before the weight multiplies it (Llama, Qwen, Mistral);
            "gemma" rounds once at the end (Gemma, gpt-oss).

    Returns y like x, contiguous. Statistics, products and dweight's sum are fp32; nothing is in place. Saved for
    backward: x, weight, rstd (4 bytes a row). dweight is computed only if weight requires a gradient.
    Raises TypeError or ValueError for wrong dtypes, shapes, devices or options.
    """
    _check("rms_norm", x, weight, eps, rounding)
    if choose("rms_norm", x, weight).backend is Backend.REFERENCE:
        return reference.rms_norm(x, weight, eps=eps, offset=offset, rounding=rounding)
    if torch.compiler.is_compiling():
        return _FORWARD(x, weight, eps, offset, rounding == "llama")[0]
    return _RMSNorm.apply(x, weight, eps, offset, rounding == "llama")


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    rounding: str = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + residual; return rms_norm(s, weight), s``, in one pass over both, with one pass in backward too.

    x and residual: (..., H), one shape and dtype; the other arguments as in ``rms_norm``. Returns (y, s), both like x
    and contiguous. Saved for backward: s, weight, rstd. The gradients of x and residual are one tensor (eager).
    """
    _check("add_rms_norm", x, weight, eps, rounding)
    checks.check_same_shape("add_rms_norm", "residual", residual, "x", x)
    checks.check_same_dtype("add_rms_norm", "residual", residual, "x", x)
    if choose("add_rms_norm", x, residual, weight).backend is Backend.REFERENCE:
        return reference.add_rms_norm(x, residual, weight, eps=eps, offset=offset, rounding=rounding)
    if torch.compiler.is_compiling():
        return _ADD_FORWARD(x, residual, weight, eps, offset, rounding == "llama")[:2]
    return _AddRMSNorm.apply(x, residual, weight, eps, offset, rounding == "llama")
