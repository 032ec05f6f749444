"""Sum over the rows of a small fp32 matrix: the last step of every weight gradient that programs summed in parts.

torch's own sum over 500 rows of 4,096 and the cast after it take 24 us on an H200, a quarter of the whole backward.
``sum_rows`` is a launch of its own; ``finish_sum`` does it inside the launch that made the parts: the programs that
finish last wait for each other and take a slice of the columns each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels.ops._common import processors


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(x_ptr, out_ptr, rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[c] = sum over rows of x[row, c] for BLOCK_C columns, always in the same order."""
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        total += tl.load(x_ptr + row * width + col, mask=(row < rows) & (col < width), other=0.0)
    out = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(out_ptr + out, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=out < width)


@triton.jit
def finish_sum(
    partial_ptr, out_ptr, counter_ptr, width,
    SLICES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Called by every program after it stored its row of ``partial``: out[c] = sum over the programs' rows.

    counter (2, int32) is zero before and after. The last SLICES programs to come here wait for those still under way
    (fewer than SLICES wait, so one of the others always has room: ``slices_for``) and share the columns. The order of
    the sum is that of the rows, whoever computes it.
    """
    tl.debug_barrier()
    programs = tl.num_programs(0)
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    slices = tl.minimum(SLICES, programs)
    first = programs - arrived
    if first < slices:
        while arrived < programs:
            arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        tl.debug_barrier()
        for part in range(first, tl.cdiv(width, BLOCK_C), slices):
            col = part * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            for start in range(0, programs, BLOCK_R):
                row = start + tl.arange(0, BLOCK_R)[:, None]
                here = (row < programs) & (col < width)
                total += tl.load(partial_ptr + row * width + col, mask=here, other=0.0, cache_modifier=".cg")
            out = part * BLOCK_C + tl.arange(0, BLOCK_C)
            tl.store(out_ptr + out, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=out < width)
        if tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel") == slices - 1:
            tl.store(counter_ptr, 0)
            tl.store(counter_ptr + 1, 0)


def finish_cut(x: torch.Tensor) -> tuple[int, int, int]:
    """(SLICES, BLOCK_R, BLOCK_C) of ``finish_sum`` for a gradient of x's width. Measured on an H200: a whole sector or
    two of columns, and so many rows that the programs' parts are read in two or three steps.
    """
    return (slices_for(processors(x.device)) if x.is_cuda else 1), 128, 32 if x.shape[-1] > 2048 else 16


def slices_for(multiprocessors: int) -> int:
    """How many programs may wait for others. They must leave room for those they wait for, and a multiprocessor holds
    at least one program: no more than there are multiprocessors, on small GPUs half as many, for two streams at once.
    """
    return 128 if multiprocessors >= 128 else max(1, multiprocessors // 2)


_counters: dict[tuple[int, int], torch.Tensor] = {}


def counter(device: torch.device) -> torch.Tensor:
    """A zero counter for ``finish_sum``: one per stream, whose launches follow each other; while a graph is captured
    a fresh one, because replays may overlap.
    """
    if device.type != "cuda":
        return torch.zeros(2, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]


def sum_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (rows, width), fp32, contiguous -> (width,) in ``dtype``; zeros when there are no rows."""
    rows, width = x.shape
    out = torch.empty(width, dtype=dtype, device=x.device)
    # 8 columns are one memory sector: many programs, and most matrices are read in one step.
    sum_rows_kernel[(triton.cdiv(width, 8),)](x, out, rows, width, 512, 8, num_warps=4)
    return out
