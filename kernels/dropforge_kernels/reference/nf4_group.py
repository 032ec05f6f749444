"""A group of NF4 weights in plain PyTorch: one by one. See ops/nf4_group.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from dropforge_kernels.reference.nf4_dequantize import nf4_dequantize

if TYPE_CHECKING:
    from dropforge_kernels.ops.nf4_group import Nf4Group


class Nf4Weight(NamedTuple):
    """One double-quantised weight: the tensors of ``nf4_dequantize`` of these names, and its (rows, columns)."""

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: torch.Tensor
    shape: tuple[int, int]


def nf4_dequantize_group(group: Nf4Group, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fills the views of the output buffer and returns them."""
    for weight, view in zip(group.weights, views, strict=True):
        nf4_dequantize(
            weight.packed,
            weight.absmax,
            group.code,
            shape=weight.shape,
            dtype=view.dtype,
            blocksize=group.blocksize,
            nested_absmax=weight.nested_absmax,
            nested_code=group.nested_code,
            nested_offset=weight.nested_offset,
            nested_blocksize=group.nested_blocksize,
            out=view,
        )
    return list(views)
