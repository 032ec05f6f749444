"""Several NF4 weights (a layer's, say) dequantised into one buffer in one launch: no launch gaps, an eighth of the
host time.

The values are those of ops/nf4_dequantize.py, bit for bit. The weights stay where they are: a table of their
addresses is built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dropforge_kernels import reference
from dropforge_kernels.checks import FLOATS, check_dtype
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops.nf4_dequantize import TILE_BYTES, nf4_group_kernel
from dropforge_kernels.reference.nf4_group import Nf4Weight

OP = "nf4_dequantize_group"
TILE = 2 * TILE_BYTES
"""Values of one program; every weight of a group must be a multiple of it (hidden sizes are)."""


@dataclass(frozen=True)
class Nf4Group:
    """What ``nf4_group`` returns: the weights, the shared codes, the device table of addresses, and each tile's row
    in it.
    """

    weights: tuple[Nf4Weight, ...]
    code: torch.Tensor
    nested_code: torch.Tensor
    table: torch.Tensor
    owner: torch.Tensor
    numel: int
    blocksize: int
    nested_blocksize: int


def nf4_group(
    weights: Sequence[Nf4Weight],
    *,
    code: torch.Tensor,
    nested_code: torch.Tensor,
    blocksize: int = 64,
    nested_blocksize: int = 256,
) -> Nf4Group:
    """Prepares a group once. The weights' tensors (fields as the arguments of ``nf4_dequantize``) are kept, not
    copied, and must not move.

    Raises ValueError for an empty group, a weight whose size is no multiple of 2,048 values, and tensors of a wrong
    size or dtype."""
    if not weights:
        raise ValueError("nf4_group: weights must hold at least one weight; received none")
    rows, tiles = [], 0
    for i, w in enumerate(weights):
        numel = w.shape[0] * w.shape[1]
        blocks = numel // blocksize
        if numel == 0 or numel % TILE:
            raise ValueError(
                f"nf4_group: weight {i} must have a multiple of {TILE} values; received shape {tuple(w.shape)}"
            )
        wanted = (
            ("packed", w.packed, torch.uint8, numel // 2),
            ("absmax", w.absmax, torch.uint8, blocks),
            ("nested_absmax", w.nested_absmax, torch.float32, -(-blocks // nested_blocksize)),
            ("nested_offset", w.nested_offset, torch.float32, 1),
        )
        for name, tensor, dtype, size in wanted:
            if tensor.dtype is not dtype or tensor.numel() != size or not tensor.is_contiguous():
                received = f"{tensor.numel()} of {tensor.dtype}, strides {tensor.stride()}"
                raise ValueError(
                    f"nf4_group: {name} of weight {i} must be {size} contiguous values of {dtype}; received {received}"
                )
        if w.packed.data_ptr() % 16 or w.absmax.data_ptr() % 16:
            raise ValueError(f"nf4_group: packed and absmax of weight {i} must start at a multiple of 16 bytes")
        rows.append([t.data_ptr() for _, t, *_ in wanted] + [tiles])
        tiles += numel // TILE
    table = torch.tensor(rows, dtype=torch.int64)
    counts = torch.tensor([w.shape[0] * w.shape[1] // TILE for w in weights])
    owner = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(counts)
    table, owner = table.to(code.device), owner.to(code.device)
    return Nf4Group(tuple(weights), code, nested_code, table, owner, tiles * TILE, blocksize, nested_blocksize)


def _launch(sources, table, owner, code, nested_code, out, blocksize, nested_blocksize):
    nf4_group_kernel[(owner.numel(),)](
        table,
        owner,
        code,
        nested_code,
        out,
        NESTED_BLOCK=nested_blocksize,
        BYTES=blocksize // 2,
        BLOCKS=TILE // blocksize,
        num_warps=2,
        enable_fp_fusion=False,  # bitsandbytes rounds the product before it adds the offset
    )


@torch.library.custom_op("dropforge::nf4_dequantize_group", mutates_args=("out",))
def _dequantize(
    sources: list[torch.Tensor],
    table: torch.Tensor,
    owner: torch.Tensor,
    code: torch.Tensor,
    nested_code: torch.Tensor,
    out: torch.Tensor,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    _launch(sources, table, owner, code, nested_code, out, blocksize, nested_blocksize)


@_dequantize.register_fake
def _(sources, table, owner, code, nested_code, out, blocksize, nested_blocksize):
    return None


def nf4_dequantize_group(group: Nf4Group, out: torch.Tensor) -> list[torch.Tensor]:
    """Dequantises the whole group into ``out`` and returns one view of it per weight, in the weights' shapes. Not
    differentiable.

    out: flat, contiguous, bf16, fp16 or fp32, at least group.numel values, on the weights' device. No host wait; can
    be captured. Raises TypeError or ValueError for a wrong buffer."""
    check_dtype(OP, "out", out, FLOATS)
    if out.dim() != 1 or not out.is_contiguous() or out.numel() < group.numel:
        received = f"shape {tuple(out.shape)}, strides {out.stride()}"
        raise ValueError(
            f"{OP}: out must be flat and contiguous with at least {group.numel} values; received {received}"
        )
    sizes = [w.shape[0] * w.shape[1] for w in group.weights]
    views = [part.view(w.shape) for part, w in zip(out[: group.numel].split(sizes), group.weights, strict=True)]
    if choose(OP, out, group.table).backend is Backend.REFERENCE:
        return reference.nf4_dequantize_group(group, views)
    sources = [t for w in group.weights for t in w[:4]] if torch.compiler.is_compiling() else []
    # The dispatcher's Python layers cost the host more than the launch; only torch.compile needs them.
    run = _dequantize if torch.compiler.is_compiling() else _launch
    tensors = (group.table, group.owner, group.code, group.nested_code, out)
    run(sources, *tensors, group.blocksize, group.nested_blocksize)
    return views
