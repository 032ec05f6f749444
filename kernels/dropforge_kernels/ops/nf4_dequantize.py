"""NF4 weights (4 bits a value, block scales themselves quantised to 8 bits) to bf16, fp16 or fp32, in one launch.

    scale[b] = nested_code[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset       (two fp32 roundings)
    out[i]   = dtype(code[nibble i] * scale[i // blocksize])                                       (one fp32 rounding,
    one to dtype)

Nibble 2k is the high half of byte k, nibble 2k + 1 the low half. Without nested scales, absmax is fp32 and is the
scale. The roundings are those of bitsandbytes, in its order (multiply and add are kept apart), so results are
bit-identical to its dequantize_4bit. Format: Dettmers et al. 2023 (QLoRA, arXiv:2305.14314), section 3, and the
documented fields of bitsandbytes' QuantState."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dropforge_kernels import reference
from dropforge_kernels.checks import FLOATS, check_dtype, check_same_device, check_tensor
from dropforge_kernels.dispatch import Backend, choose

OP = "nf4_dequantize"
TILE_BYTES = 1024
"""Packed bytes of one program, 16 a thread: 2,048 values. Measured best on an H200."""


@triton.jit
def _tile(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    first,
    numel,
    EVEN: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS quantisation blocks of BYTES bytes from block ``first`` on. EVEN: the tile lies inside the weight, no
    masks.

    The 16 values are looked up in shared memory (tl.gather), where 16 neighbouring words never conflict; a lookup in
    device memory would also force the tile through a layout change on its way in and out."""
    row = tl.arange(0, BLOCKS)
    byte = row[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    at = row[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    live, in_bytes, in_values = None, None, None
    if not EVEN:
        left = tl.minimum(numel - first * (2 * BYTES), 2 * BYTES * BLOCKS).to(tl.int32)
        live = row * (2 * BYTES) < left
        in_bytes = 2 * byte < left
        in_values = at < left
    both = tl.load(packed_ptr + first * BYTES + byte, mask=in_bytes).to(tl.int32)
    if NESTED:
        level = tl.load(absmax_ptr + first + row, mask=live).to(tl.int32)  # any byte is a valid index
        group = ((first % NESTED_BLOCK).to(tl.int32) + row) // NESTED_BLOCK
        group_scale = tl.load(nested_absmax_ptr + first // NESTED_BLOCK + group, mask=live)
        scale = tl.load(nested_code_ptr + level) * group_scale + tl.load(nested_offset_ptr)
    else:
        scale = tl.load(absmax_ptr + first + row, mask=live)
    nibbles = tl.reshape(tl.join((both >> 4) & 15, both & 15), (2 * BLOCKS * BYTES,))
    values = tl.gather(tl.load(code_ptr + tl.arange(0, 16)), nibbles, 0)
    values = tl.reshape(values, (BLOCKS, 2 * BYTES)) * scale[:, None]
    tl.store(out_ptr + first * (2 * BYTES) + at, values.to(out_ptr.dtype.element_ty), mask=in_values)


@triton.jit
def nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    numel,
    EVEN: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One weight, one tile a program."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    _tile(
        packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, out_ptr,
        first, numel, EVEN, NESTED, NESTED_BLOCK, BYTES, BLOCKS,
    )  # fmt: skip


@triton.jit
def nf4_group_kernel(
    table_ptr, owner_ptr, code_ptr, nested_code_ptr, out_ptr,
    NESTED_BLOCK: tl.constexpr, BYTES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Several weights into one buffer, one after the other. owner[tile]: the row of the tile's weight in the table.
    Row: addresses of packed, absmax, nested absmax and offset, and the number of the weight's first tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(owner_ptr + tile) * 5
    packed_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(tl.uint8)), 16)
    absmax_ptr = tl.multiple_of(tl.load(row_ptr + 1).to(tl.pointer_type(tl.uint8)), 16)
    nested_absmax_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    nested_offset_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32))
    start = tl.load(row_ptr + 4)
    _tile(
        packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
        out_ptr + start * (2 * BYTES * BLOCKS), (tile - start) * BLOCKS, 0, True, True, NESTED_BLOCK, BYTES, BLOCKS,
    )  # fmt: skip


def _launch(packed, absmax, code, nested_absmax, nested_code, nested_offset, out, blocksize, nested_blocksize):
    numel = out.numel()
    if numel == 0:
        return
    nested = nested_absmax is not None
    blocks = (numel + blocksize - 1) // blocksize
    rows = max(1, 2 * TILE_BYTES // blocksize)
    nf4_dequantize_kernel[((blocks + rows - 1) // rows,)](
        packed,
        absmax,
        code,
        nested_absmax if nested else absmax,
        nested_code if nested else absmax,
        nested_offset if nested else absmax,
        out,
        numel,
        EVEN=numel % (rows * blocksize) == 0,
        NESTED=nested,
        NESTED_BLOCK=nested_blocksize,
        BYTES=blocksize // 2,
        BLOCKS=rows,
        num_warps=2,
        enable_fp_fusion=False,  # bitsandbytes rounds the product before it adds the offset
    )


@torch.library.custom_op("dropforge::nf4_dequantize", mutates_args=("out",))
def _dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    out: torch.Tensor,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    _launch(packed, absmax, code, nested_absmax, nested_code, nested_offset, out, blocksize, nested_blocksize)


@_dequantize.register_fake
def _(packed, absmax, code, nested_absmax, nested_code, nested_offset, out, blocksize, nested_blocksize):
    return None


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    nested_absmax: torch.Tensor | None = None,
    nested_code: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    nested_blocksize: int = 256,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantises into ``out`` (or a new tensor) and returns it; formula at the top of this file. Not differentiable.

    packed: uint8, ceil(numel / 2) bytes in any shape. absmax: uint8 with the three nested arguments, fp32 without,
    one per block. code: fp32 (16,). nested_absmax: fp32, one per nested_blocksize blocks; nested_code: fp32 (256,);
    nested_offset: fp32, one value. All contiguous. In the terms of bitsandbytes' QuantState ``s``: absmax=s.absmax,
    code=s.code, shape=s.shape, nested_absmax= s.state2.absmax, nested_code=s.state2.code, nested_offset=s.offset,
    nested_blocksize=s.state2.blocksize. blocksize and nested_blocksize: powers of two. out: contiguous, of ``shape``
    and ``dtype``; wholly overwritten, so one scratch buffer serves a model's layers. 64-bit indices: any size. No
    host wait; can be captured. Raises TypeError and ValueError for wrong dtypes, sizes, devices, strides."""
    result = torch.empty(tuple(shape), dtype=dtype, device=packed.device) if out is None else out
    nested = (nested_absmax, nested_code, nested_offset)
    _check(packed, absmax, code, nested, result, tuple(shape), dtype, blocksize, nested_blocksize)
    if choose(OP, packed, absmax, code, result).backend is Backend.REFERENCE:
        return reference.nf4_dequantize(
            packed,
            absmax,
            code,
            shape=shape,
            dtype=dtype,
            blocksize=blocksize,
            nested_absmax=nested_absmax,
            nested_code=nested_code,
            nested_offset=nested_offset,
            nested_blocksize=nested_blocksize,
            out=result,
        )
    # The dispatcher's Python layers cost the host more than the launch; only torch.compile needs them.
    run = _dequantize if torch.compiler.is_compiling() else _launch
    run(packed, absmax, code, *nested, result, blocksize, nested_blocksize)
    return result


def _check(packed, absmax, code, nested, out, shape, dtype, blocksize, nested_blocksize):
    check_tensor(OP, "packed", packed)
    check_dtype(OP, "packed", packed, {torch.uint8})
    check_dtype(OP, "out", out, FLOATS)
    if out.shape != shape or out.dtype is not dtype:
        raise ValueError(
            f"{OP}: out must have shape {shape} and dtype {dtype}; received {tuple(out.shape)} and {out.dtype}"
        )
    for name, value in (("blocksize", blocksize), ("nested_blocksize", nested_blocksize)):
        if value < 2 or value & (value - 1):
            raise ValueError(f"{OP}: {name} must be a power of two of at least 2; received {value}")
    numel = out.numel()
    blocks = -(-numel // blocksize)
    given = [t is not None for t in nested]
    if any(given) and not all(given):
        names = "nested_absmax, nested_code and nested_offset"
        raise ValueError(f"{OP}: {names} must be given together; received {given}")
    wanted = [("packed", packed, torch.uint8, -(-numel // 2)), ("code", code, torch.float32, 16)]
    wanted.append(("absmax", absmax, torch.uint8 if all(given) else torch.float32, blocks))
    if all(given):
        nested_blocks = -(-blocks // nested_blocksize)
        names = ("nested_absmax", "nested_code", "nested_offset")
        sizes = (nested_blocks, 256, 1)
        wanted += [(n, t, torch.float32, s) for n, t, s in zip(names, nested, sizes, strict=True)]
    for name, tensor, kind, size in wanted:
        if tensor.dtype is not kind or tensor.numel() != size:
            raise ValueError(
                f"{OP}: {name} must have {size} values of {kind} for shape {shape}; "
                f"received {tensor.numel()} of {tensor.dtype}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{OP}: {name} must be contiguous; received strides {tensor.stride()}")
    if not out.is_contiguous():
        raise ValueError(f"{OP}: out must be contiguous; received strides {out.stride()}")
    check_same_device(OP, packed=packed, absmax=absmax, code=code, out=out)
