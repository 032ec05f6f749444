"""What the operations' launchers share: rows of a tensor without copying, and registration of opaque custom ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from dropforge_kernels.checks import FLOATS


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns (tensor, distance between rows) with the last dimension contiguous and all leading ones walked by one
    stride.

    Copies only where the layout cannot be walked like that. The tensor keeps its shape; kernels take its pointer and
    the stride.
    """
    if x.is_contiguous():
        return x, x.shape[-1] if x.dim() else 1
    strides, shape = x.stride(), x.shape
    if strides[-1] == 1 or shape[-1] == 1:
        outer = x.dim() - 2
        if outer < 0:
            return x, shape[-1]
        if all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(outer)):
            return x, strides[outer]
    return x.contiguous(), shape[-1]


def register(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Registers ``dropforge::name`` as one opaque op for torch.compile and export: no mutation, no aliasing, ``fake``
    for shapes.

    Eager calls do not go through it: the dispatcher's Python layers cost the host more than the launch itself.
    """
    op = torch.library.custom_op(f"dropforge::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as torch's own attention takes them: in the dtype of autocast where that is on, else as they are.

    Under autocast q and k may come in fp32 (a rotation in fp32) beside a bf16 v.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.dtype in FLOATS else t for t in tensors)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; 1 for the interpreter's CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def row_block(width: int, rows: int, *, forward: bool) -> tuple[int, int, int]:
    """(BLOCK_H, BLOCK_R, warps) of a kernel that holds whole rows.

    Measured on an H200 over widths 1,024 to 4,096 and 1,024 to 16,384 rows: one row a program, and one warp per 512
    elements that are really there in a forward, per 1,024 in a backward. A forward takes two rows and 16 warps from
    4,096 on when there is much to do (32M elements), two rows and 4 warps at 1,024. Narrower rows share a program.
    """
    block_h = next_power_of_2(width)
    if forward and 4096 <= block_h <= 8192 and width >= 4096 and rows * width > 32 << 20:
        return block_h, 2, 16
    if forward and block_h <= 1024:
        return block_h, min(16, 2048 // block_h), 4
    warps = next_power_of_2(width // (512 if forward else 1024) + 1) // 2
    return block_h, max(1, min(16, 1024 // block_h)), max(2, min(16, warps))


def summing_rows(width: int, rows: int, x: torch.Tensor) -> tuple[int, int, int, int]:
    """(warps, programs, loads in flight, BLOCK_R) of a backward that also makes sums over the rows of x.

    Measured on an H200 at widths of 1,024, 2,560 and 4,096: few programs walk many rows (at least 8), so that the
    partial sums stay a few per cent of the traffic, and keep rows of two tensors in flight in shared memory while they
    fit. A width that does not fill its power of two (2,560) has more, smaller programs.
    """
    block_h = next_power_of_2(width)
    if block_h <= 1024:
        block_r, warps, per_processor, stages = min(16, 2048 // block_h), 4, 3, 4
    elif block_h == 4096:
        block_r, warps, per_processor, stages = (2, 8, 1, 3) if width > 3072 else (1, 4, 2, 4)
    else:
        block_r, warps, stages = 1, max(4, min(16, block_h // 1024)), 3
        per_processor = max(2, min(4, 8192 // block_h))
    if 2 * (stages - 1) * block_r * block_h * x.element_size() > 128 << 10:
        stages = 1
    return warps, min(-(-rows // max(8, block_r)), per_processor * processors(x.device)), stages, block_r
