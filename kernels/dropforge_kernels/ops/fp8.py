"""FP8 (e4m3fn, largest value 448) quantisation and back, one scale per row or per 128 x 128 block.

    amax  = max(max |x|, 1e-12) over the row or block            scale = amax / 448                       (fp32)
    codes = e4m3(clamp(x * (448 / amax), -448, 448))             back  = dtype(fp32(codes) * scale)

Round to nearest, ties to even. A NaN or infinite input makes its row's or block's scale NaN or infinite: nothing
hides it. Format: Micikevicius et al. 2022 (arXiv:2209.05433); 128 x 128 weight blocks: DeepSeek-V3 report
(arXiv:2412.19437), section 3.3. Not differentiable: callers that need gradients wrap their matrix product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels import reference
from dropforge_kernels.checks import FLOATS, check_dtype, check_ndim, check_same_device, check_shape, check_tensor
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._common import as_rows

BLOCK = 128
FP8 = frozenset({torch.float8_e4m3fn})
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(1e-12)


@triton.jit
def _to_codes(x, factor, PRE_ROUND: tl.constexpr):
    """e4m3 of x * factor. PRE_ROUND rounds in fp32 first, for Triton's interpreter, whose conversion does not round."""
    y = tl.minimum(
        tl.maximum(x * factor, -E4M3_MAX, propagate_nan=tl.PropagateNan.ALL),
        E4M3_MAX,
        propagate_nan=tl.PropagateNan.ALL,
    )
    if PRE_ROUND:
        exponent = (y.to(tl.int32, bitcast=True) >> 23) & 255
        # adding 1.5 * 2^23 grid steps leaves no bits below one step: 2^(e - 3), or 2^-9 below the smallest normal 2^-6
        step_exponent = tl.maximum(exponent - 127, -6) - 3
        magic = ((step_exponent + 23 + 127) << 23 | 0x400000).to(tl.float32, bitcast=True)
        y = (y + magic) - magic
    return y.to(tl.float8e4nv)


@triton.jit
def _row_quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, x_stride, C, PRE_ROUND: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One row: its largest magnitude, then its codes; rows above BLOCK_C values are read again, from the cache."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_C)
    if ONE_PASS:
        held = tl.load(x_ptr + row * x_stride + lanes, mask=lanes < C, other=0.0).to(tl.float32)
        largest = tl.abs(held)
    else:
        largest = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            x = tl.load(x_ptr + row * x_stride + start + lanes, mask=start + lanes < C, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    found = tl.max(largest, axis=0)
    found = tl.where(tl.sum((largest != largest).to(tl.int32), axis=0) > 0, float("nan"), found)
    amax = tl.where(found < SMALLEST_AMAX, SMALLEST_AMAX, found)
    factor = tl.div_rn(E4M3_MAX, amax)
    tl.store(scale_ptr + row, tl.div_rn(amax, E4M3_MAX))
    if ONE_PASS:
        tl.store(codes_ptr + row * C + lanes, _to_codes(held, factor, PRE_ROUND), mask=lanes < C)
    else:
        for start in range(0, C, BLOCK_C):
            at = start + lanes
            x = tl.load(x_ptr + row * x_stride + at, mask=at < C, other=0.0).to(tl.float32)
            tl.store(codes_ptr + row * C + at, _to_codes(x, factor, PRE_ROUND), mask=at < C)


@triton.jit
def _block_quantize_kernel(x_ptr, codes_ptr, scale_ptr, x_stride, R, C, PRE_ROUND: tl.constexpr, SIZE: tl.constexpr):
    """One SIZE x SIZE block, held in registers: one read, one write."""
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[:, None].to(tl.int64)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]
    mask = (rows < R) & (columns < C)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    found = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    found = tl.where(tl.sum(tl.sum((x != x).to(tl.int32), axis=1), axis=0) > 0, float("nan"), found)
    amax = tl.where(found < SMALLEST_AMAX, SMALLEST_AMAX, found)
    tl.store(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.div_rn(amax, E4M3_MAX))
    codes = _to_codes(x, tl.div_rn(E4M3_MAX, amax), PRE_ROUND)
    tl.store(codes_ptr + rows * C + columns, codes, mask=mask)


@triton.jit
def _dequantize_kernel(
    codes_ptr, scale_ptr, out_ptr, R, C, scale_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr
):
    """A tile of ROWS x COLUMNS; SIZE = 1: one scale per row, else the tile lies inside one SIZE x SIZE block."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < R) & (columns < C)
    codes = tl.load(codes_ptr + rows * C + columns, mask=mask, other=0.0).to(tl.float32)
    if SIZE == 1:
        scale = tl.load(scale_ptr + rows, mask=rows < R, other=0.0)
    else:
        scale = tl.load(scale_ptr + tl.program_id(0) * ROWS // SIZE * scale_stride + tl.program_id(1) * COLUMNS // SIZE)
    tl.store(out_ptr + rows * C + columns, (codes * scale).to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dropforge::fp8_quantize_rows", mutates_args=())
def _quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, stride = as_rows(x)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    columns = x.shape[-1]
    if scale.numel():
        block = min(16384, triton.next_power_of_2(max(16, columns)))
        warps = max(1, min(16, block // 512))
        _row_quantize_kernel[(scale.numel(),)](
            x,
            codes,
            scale,
            stride,
            columns,
            PRE_ROUND=not x.is_cuda,
            ONE_PASS=columns <= block,
            BLOCK_C=block,
            num_warps=warps,
        )
    return codes, scale


@_quantize_rows.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _blocks(shape):
    return (shape[0] + BLOCK - 1) // BLOCK, (shape[1] + BLOCK - 1) // BLOCK


@torch.library.custom_op("dropforge::fp8_quantize_blocks", mutates_args=())
def _quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, stride = as_rows(x)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(_blocks(x.shape), dtype=torch.float32, device=x.device)
    if scale.numel():
        _block_quantize_kernel[_blocks(x.shape)](
            x, codes, scale, stride, x.shape[0], x.shape[1], PRE_ROUND=not x.is_cuda, SIZE=BLOCK, num_warps=8
        )
    return codes, scale


@_quantize_blocks.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(_blocks(x.shape), dtype=torch.float32)


def _launch_dequantize(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, size: int) -> None:
    columns = codes.shape[-1]
    rows = codes.numel() // columns if columns else 0
    if rows:
        tile_rows, tile_columns = (4, 1024) if size == 1 else (32, 128)
        _dequantize_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))](
            codes,
            scale,
            out,
            rows,
            columns,
            scale.shape[-1] if size > 1 else 1,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            SIZE=size,
            num_warps=4,
        )


@torch.library.custom_op("dropforge::fp8_dequantize", mutates_args=("out",))
def _dequantize(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, size: int) -> None:
    _launch_dequantize(codes, scale, out, size)


@_dequantize.register_fake
def _(codes, scale, out, size):
    return None


def _check_values(op: str, x: torch.Tensor) -> None:
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dimension; received shape {tuple(x.shape)}")


def fp8_quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., C) bf16, fp16 or fp32 -> (codes e4m3fn (..., C), scale fp32 (...)), one scale per row; formula at the
    top of this file.

    Any strides; results contiguous. Raises TypeError or ValueError for wrong dtypes or shapes.
    """
    _check_values("fp8_quantize_rows", x)
    if choose("fp8_quantize_rows", x).backend is Backend.REFERENCE:
        return reference.fp8_quantize_rows(x)
    return _quantize_rows(x.detach())


def fp8_quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, C) bf16, fp16 or fp32 -> (codes e4m3fn (R, C), scale fp32 (ceil(R / 128), ceil(C / 128))); edge blocks
    are partial.

    Any strides; results contiguous. Raises TypeError or ValueError for wrong dtypes or shapes.
    """
    _check_values("fp8_quantize_blocks", x)
    check_ndim("fp8_quantize_blocks", "x", x, 2)
    if choose("fp8_quantize_blocks", x).backend is Backend.REFERENCE:
        return reference.fp8_quantize_blocks(x)
    return _quantize_blocks(x.detach())


def fp8_dequantize_rows(
    codes: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """codes e4m3fn (..., C), scale fp32 (...) -> dtype (..., C), into ``out`` (contiguous) if given."""
    op = "fp8_dequantize_rows"
    check_tensor(op, "codes", codes)
    check_shape(op, "scale", scale, tuple(codes.shape[:-1]))
    return _dequantized(op, codes, scale, dtype, out, 1)


def fp8_dequantize_blocks(
    codes: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """codes e4m3fn (R, C), scale fp32 (ceil(R / 128), ceil(C / 128)) -> dtype (R, C), into ``out`` (contiguous) if
    given.
    """
    op = "fp8_dequantize_blocks"
    check_tensor(op, "codes", codes)
    check_ndim(op, "codes", codes, 2)
    check_shape(op, "scale", scale, _blocks(codes.shape))
    return _dequantized(op, codes, scale, dtype, out, BLOCK)


def _dequantized(op, codes, scale, dtype, out, size):
    check_dtype(op, "codes", codes, FP8)
    check_dtype(op, "scale", scale, {torch.float32})
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    check_dtype(op, "out", result, FLOATS)
    if result.shape != codes.shape or result.dtype is not dtype or not result.is_contiguous():
        received = f"{tuple(result.shape)}, {result.dtype}, strides {result.stride()}"
        raise ValueError(
            f"{op}: out must be contiguous with shape {tuple(codes.shape)} and dtype {dtype}; received {received}"
        )
    check_same_device(op, codes=codes, scale=scale, out=result)
    if choose(op, codes, scale).backend is Backend.REFERENCE:
        call = reference.fp8_dequantize_rows if size == 1 else reference.fp8_dequantize_blocks
        return call(codes, scale, dtype=dtype, out=result)
    # The dispatcher's Python layers cost the host more than the launch; only torch.compile needs them.
    run = _dequantize if torch.compiler.is_compiling() else _launch_dequantize
    run(codes.contiguous(), scale.contiguous(), result, size)
    return result
