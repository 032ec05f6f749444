"""Rows of an embedding whose table lies in host memory: a gigabyte of the GPU for a large vocabulary.

    out[t] = table[ids[t]]

A GPU reads pinned host memory over the bus by itself, so one launch fetches the rows of a batch: the ids stay on the
GPU, nothing waits for the host, and the launch can be captured. 8,192 tokens of 4,096 values in 16 bits are 64 MiB on
the bus, a few milliseconds of a step. Frozen tables only: a gradient would have to go back the same way.

Legend: V rows of the table, W their width, T ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST_BLOCK = 2048


@triton.jit
def host_rows_kernel(table_ptr, ids_ptr, out_ptr, V, W, blocks_per_row, BLOCK: tl.constexpr):
    """out[t] = table[ids[t]]; NaN for an id outside the table, which must not read whatever lies there."""
    token = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    at = (tl.program_id(0) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    known = (row >= 0) & (row < V)
    values = tl.load(table_ptr + row * W + at, mask=(at < W) & known, other=float("nan"))
    tl.store(out_ptr + token * W + at, values, mask=at < W)


@torch.library.custom_op("dropforge::host_rows", mutates_args=())
def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table (V, W) in memory that the ids' device can read, ids (T) -> (T, W) on the ids' device, in the table's dtype.

    An id outside the table gives a row of NaN.
    """
    out = torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype, device=ids.device)
    if out.numel():
        block = min(WIDEST_BLOCK, triton.next_power_of_2(table.shape[1]))
        blocks = triton.cdiv(table.shape[1], block)
        grid = (ids.shape[0] * blocks,)
        host_rows_kernel[grid](table, ids, out, table.shape[0], table.shape[1], blocks, BLOCK=block, num_warps=4)
    return out


@gather_rows.register_fake
def _(table, ids):
    return torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype, device=ids.device)


def host_rows(table: torch.Tensor, ids: torch.Tensor, *, pinned: bool) -> torch.Tensor:
    """table (V, W) contiguous on the host, ids (...) int64 or int32 anywhere -> (..., W) on the ids' device.

    pinned: the table lies in pinned memory. Without that the ids come to the host, which waits for the device.
    """
    if pinned and ids.is_cuda:
        rows: torch.Tensor = gather_rows(table, ids.reshape(-1).contiguous())
        return rows.view(*ids.shape, table.shape[1])
    return torch.nn.functional.embedding(ids.to(table.device), table).to(ids.device)
