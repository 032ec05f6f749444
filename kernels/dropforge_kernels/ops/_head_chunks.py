"""Hidden states times a head, a chunk of rows at a time: the machinery of linear_cross_entropy and linear_logprobs.

Legend: N tokens, H hidden size, V vocabulary, R rows of a chunk. One buffer of (R, V) logits in the hidden states'
dtype is all that exists of the logits. Per chunk: logits = hidden W^T (vendor GEMM), losses and gradient in place in
one launch, d hidden = d logits W and, for a trained head, d W += d logits^T hidden in fp32.

Rows that do not count are left out before the GEMM:

- the caller knows a bound on the rows that count (``max_valid``; a collator counts labels on the host): the rows are
compacted on the
  device into ``max_valid`` slots. No wait, fixed shapes, capturable. If the bound was wrong the loss is NaN.
- no bound, several chunks: the rows are compacted and their number is copied to pinned memory while the first chunk
  runs; the host reads it after that chunk has been queued, so the GPU never idles, but the host waits for the device to
  reach this point.
- no bound, one chunk of much work (WORTH_WAITING): the number is read before the chunk, and the GPU idles for the few
  tens of microseconds that the host needs to go on. Two half chunks would hide that, and cost more: 512 rows of d
  hidden are 64 tiles of 128 x 256 over 4,096 columns, half of an H200's 132 processors, where 1,024 rows are 128.
- during CUDA graph capture without a bound every row is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

FROZEN_BUDGET = 400 << 20
"""Bytes of the logits buffer by default, head frozen: 1,024 rows of 128,256 or 151,936 bf16 logits, 768 of 262,208;
with the gradient of 16K tokens under half a GiB. 1,024 rows make one wave of 128 x 256 tiles over 4,096 columns.
"""
TRAINED_BUDGET = 1 << 30
"""The same with a trained head: each chunk reads and writes d W once in fp32 (8 V H bytes), so chunks are larger."""


WORTH_WAITING = 1 << 40
"""FLOP of one chunk (4 N H V: logits and d hidden) from which the host waits for the number of rows that count: a
millisecond and a half of an H200, of which every ignored row saves its share. 1,024 rows of Llama-3-8B are twice that.
"""


class Chunk(NamedTuple):
    """Rows start:stop of the (compacted) token order; ``index`` (stop - start) holds their positions, N marking
    padding; None = as is.
    """

    start: int
    stop: int
    index: torch.Tensor | None
    target: torch.Tensor


def budget_from_free_memory(
    device: torch.device, *, fraction: float = 0.1, least: int = 64 << 20, most: int = 1 << 30
) -> int:
    """A ``memory_budget`` from what the device has free now: ``fraction`` of it between ``least`` and ``most`` bytes.

    Asks the driver (tens of microseconds), so call it once when planning, not in every step.
    """
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(least, min(most, int((free + cached) * fraction)))


def chunk_rows(rows: int, vocabulary: int, itemsize: int, budget: int) -> int:
    """Rows of a chunk: as many as fit the budget, rounded down to a multiple of 1,024, 128 or 16, so that GEMM tiles
    fill whole waves.

    At least 16. A last chunk of under half a chunk is avoided by evening out: 1,100 rows at 1,024 a chunk are 2 x 640.
    """
    fit = budget // max(1, vocabulary * itemsize)
    step = 1024 if fit >= 1024 else 128 if fit >= 128 else 16
    fit = max(16, fit // step * step)
    if rows <= fit:
        return max(1, rows)
    remainder = rows % fit
    if 0 < remainder < fit // 2:
        chunks, step = -(-rows // fit), min(step, 128)
        return -(-rows // (chunks * step)) * step
    return fit


@triton.jit
def compact_kernel(target_ptr, order_ptr, compacted_ptr, count_ptr, N, slots, ignore_index, BLOCK: tl.constexpr):
    """One program: positions and targets of the rows that count, in order, then padding (position N, target
    ignore_index); the count.
    """
    base = 0
    lanes = tl.arange(0, BLOCK)
    for start in range(0, N, BLOCK):
        at = start + lanes
        target = tl.load(target_ptr + at, mask=at < N, other=ignore_index)
        live = target != ignore_index
        ones = live.to(tl.int32)
        slot = base + tl.cumsum(ones, 0) - 1
        keep = live & (slot < slots)
        tl.store(order_ptr + slot, at, mask=keep)
        tl.store(compacted_ptr + slot, target, mask=keep)
        base += tl.sum(ones, axis=0)
    tl.store(count_ptr, base)
    for start in range(0, slots, BLOCK):
        at = start + lanes
        pad = (at >= base) & (at < slots)
        tl.store(order_ptr + at, tl.zeros([BLOCK], tl.int32) + N, mask=pad)
        tl.store(compacted_ptr + at, tl.zeros([BLOCK], compacted_ptr.dtype.element_ty) + ignore_index, mask=pad)


@triton.jit
def move_rows_kernel(
    source_ptr, out_ptr, index_ptr, source_stride, out_stride, N, W, GATHER: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = source[index[i]] (GATHER; zeros for padding) or out[index[i]] = source[i] (padding skipped), rows of W
    values.
    """
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(index_ptr + i).to(tl.int64)
    inside = (at < W) & (position < N)
    if GATHER:
        x = tl.load(source_ptr + position * source_stride + at, mask=inside, other=0.0)
        tl.store(out_ptr + i * out_stride + at, x, mask=at < W)
    else:
        x = tl.load(source_ptr + i * source_stride + at, mask=at < W, other=0.0)
        tl.store(out_ptr + position * out_stride + at, x, mask=inside)


def _move_rows(source: torch.Tensor, out: torch.Tensor, index: torch.Tensor, rows: int, *, gather: bool) -> None:
    width = source.shape[1]
    block = min(2048, triton.next_power_of_2(max(16, width)))
    move_rows_kernel[(index.numel(), triton.cdiv(width, block))](
        source, out, index, source.stride(0), out.stride(0), rows, width, GATHER=gather, BLOCK=block, num_warps=4
    )


def row_chunks(
    target: torch.Tensor, rows_per_chunk: int, *, ignore_index: int, max_valid: int | None, skip_ignored: bool,
    wait: bool = False,
) -> Iterator[Chunk]:  # fmt: skip
    """The chunks to compute. A generator: the host's wait (module docstring) happens after the consumer has queued
    the first chunk. wait: also wait for the number of rows where there is one chunk only.
    """
    rows = target.numel()
    if rows == 0:
        return
    bound = rows if max_valid is None else min(rows, max_valid)
    capturing = target.is_cuda and torch.cuda.is_current_stream_capturing()
    # the number of rows is read after the first chunk
    late = bound == rows and (rows > rows_per_chunk or (wait and max_valid is None)) and not capturing
    if not skip_ignored or (bound == rows and not late):
        yield from _split(0, rows, rows_per_chunk, None, target)
        return
    if bound == 0:
        return
    order = torch.empty(bound, dtype=torch.int32, device=target.device)
    compacted = torch.empty(bound, dtype=target.dtype, device=target.device)
    count = torch.empty(1, dtype=torch.int32, device=target.device)
    compact_kernel[(1,)](target, order, compacted, count, rows, bound, ignore_index, BLOCK=4096, num_warps=8)
    if not late:
        yield from _split(0, bound, rows_per_chunk, order, compacted)
        return
    on_host, arrived = _copy_to_host(count)
    first = rows_per_chunk if rows > rows_per_chunk else 0
    if first:
        yield Chunk(0, first, order[:first], compacted[:first])
    if arrived is not None:
        arrived.synchronize()
    counted = int(on_host)
    if not first and counted == rows:
        yield from _split(0, rows, rows_per_chunk, None, target)
        return
    yield from _split(first, counted, rows_per_chunk, order, compacted)


def _copy_to_host(count: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Starts the copy; the value is there once the event (None on the CPU) has passed."""
    if not count.is_cuda:
        return count, None
    on_host = torch.empty(1, dtype=count.dtype, pin_memory=True)
    on_host.copy_(count, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return on_host, arrived


def _split(start: int, stop: int, size: int, order: torch.Tensor | None, target: torch.Tensor) -> Iterator[Chunk]:
    for a in range(start, stop, size):
        b = min(a + size, stop)
        yield Chunk(a, b, None if order is None else order[a:b], target[a:b])


class Head:
    """One pass over the chunks: holds the buffers, hands out logits, takes gradients back.

    ``hidden`` (N, H), ``weight`` (V, H) and ``bias`` (V) in one dtype. ``d_hidden`` (N, H) in that dtype, ``d_weight``
    (V, H) and ``d_bias`` (V) in fp32, or None.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        rows_per_chunk: int,
        *,
        need_hidden: bool,
        need_weight: bool,
        bias: torch.Tensor | None = None,
        need_bias: bool = False,
    ) -> None:
        self.hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self.weight, self.bias = weight, bias
        rows, width = hidden.shape
        self.logits = hidden.new_empty((rows_per_chunk, weight.shape[0]))
        self.d_hidden = hidden.new_zeros((rows, width)) if need_hidden else None
        self.d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        self.d_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if need_bias else None
        self.gathered = self.scattered = None  # made on first use: only compacted rows need them

    def logits_of(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of hidden states (R, H), their logits (R, V) in the shared buffer)."""
        rows = chunk.stop - chunk.start
        if chunk.index is None:
            part = self.hidden[chunk.start : chunk.stop]
        else:
            if self.gathered is None:
                self.gathered = self.hidden.new_empty((self.logits.shape[0], self.hidden.shape[1]))
            part = self.gathered[:rows]
            _move_rows(self.hidden, part, chunk.index, self.hidden.shape[0], gather=True)
        logits = self.logits[:rows]
        if self.bias is None:
            torch.mm(part, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, part, self.weight.t(), out=logits)
        return part, logits

    def take_gradient(self, chunk: Chunk, part: torch.Tensor, d_logits: torch.Tensor) -> None:
        """Adds what d_logits (R, V) contributes to d_hidden, d_weight and d_bias."""
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)
        if self.d_hidden is not None:
            if chunk.index is None:
                torch.mm(d_logits, self.weight, out=self.d_hidden[chunk.start : chunk.stop])
            else:
                if self.scattered is None:
                    self.scattered = torch.empty_like(self.gathered)
                d_part = self.scattered[: d_logits.shape[0]]
                torch.mm(d_logits, self.weight, out=d_part)
                _move_rows(d_part, self.d_hidden, chunk.index, self.hidden.shape[0], gather=False)
        if self.d_weight is not None:
            if d_logits.is_cuda and d_logits.dtype is not torch.float32:
                torch.addmm(self.d_weight, d_logits.t(), part, out_dtype=torch.float32, out=self.d_weight)
            else:
                self.d_weight.addmm_(d_logits.float().t(), part.float())


@triton.jit
def scale_rows_kernel(
    x_ptr, out_ptr, a_ptr, b_ptr, W, blocks_per_row, b_stride, SIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """out = x * a[0] * b[row * b_stride] * SIGN in fp32, x and out contiguous with rows of W values."""
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    at = (tl.program_id(0) % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < W
    factor = tl.load(a_ptr) * tl.load(b_ptr + row * b_stride) * SIGN
    x = tl.load(x_ptr + row * W + at, mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + row * W + at, x.to(out_ptr.dtype.element_ty), mask=mask)


def scale_rows(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, sign: int = 1) -> torch.Tensor:
    """x (N, W, contiguous) * a * b * sign in a new tensor of ``dtype``; a: fp32 scalar; b: fp32, one value or one per
    row.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        per_row = b.dim() > 0 and b.stride(0) != 0 and x.shape[0] > 1
        width = x.shape[1] if per_row else x.numel()
        block = min(4096, triton.next_power_of_2(max(16, width)))
        blocks = triton.cdiv(width, block)
        stride = b.stride(0) if per_row else 0
        grid = (blocks * (x.shape[0] if per_row else 1),)
        scale_rows_kernel[grid](x, out, a, b, width, blocks, stride, SIGN=sign, BLOCK=block, num_warps=8)
    return out
