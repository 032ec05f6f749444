"""Parameters and their gradients re-homed into flat buffers, so that one launch reaches all of them.

A segment is a run of parameters with the same dtype and the same optimizer options. Each parameter starts at a multiple
of ALIGNMENT elements: blocks of quantised optimizer state then belong to one parameter, and every address suits
vectorised loads. The gaps are zero and stay zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

ALIGNMENT = 256


@dataclass(frozen=True)
class Segment:
    """Flat views of some parameters.

    Args:
        values, grads: (n,) in the parameters' dtype; slices of buffers that hold all segments of that dtype.
        parameters: in the order of their places.
        starts: place of each parameter.
    """

    values: torch.Tensor
    grads: torch.Tensor
    parameters: tuple[nn.Parameter, ...]
    starts: tuple[int, ...]


class FlatParameters:
    """Owns the buffers. ``parameter.data`` and ``parameter.grad`` become views; values are kept.

    Args:
        groups: parameters of each segment; all on one device.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self.segments: list[Segment] = []
        self.grads: dict[torch.dtype, torch.Tensor] = {}
        """One buffer per dtype, all segments of that dtype end to end."""
        places = [_places(group) for group in groups]
        sizes: dict[torch.dtype, int] = {}
        for group, (_, size) in zip(groups, places, strict=True):
            dtype = _one_dtype(group)
            sizes[dtype] = sizes.get(dtype, 0) + size
        device = groups[0][0].device if groups else torch.device("cpu")
        values = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self.grads = {dtype: torch.zeros_like(buffer) for dtype, buffer in values.items()}
        taken = dict.fromkeys(sizes, 0)
        for group, (starts, size) in zip(groups, places, strict=True):
            dtype = group[0].dtype
            part = slice(taken[dtype], taken[dtype] + size)
            taken[dtype] += size
            self.segments.append(Segment(values[dtype][part], self.grads[dtype][part], tuple(group), tuple(starts)))
        with torch.no_grad():
            for segment in self.segments:
                _move_in(segment)

    def zero_grad(self) -> None:
        """One memset per dtype. The views stay, unlike with ``set_to_none``."""
        for buffer in self.grads.values():
            buffer.zero_()

    def attach_grads(self) -> None:
        """Give every parameter its gradient view back, after something has replaced or dropped it."""
        for segment in self.segments:
            for parameter, start in zip(segment.parameters, segment.starts, strict=True):
                view = segment.grads[start : start + parameter.numel()].view(parameter.shape)
                if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
                    view.copy_(parameter.grad)
                parameter.grad = view

    def bytes(self) -> int:
        """Of values and gradients."""
        return sum(2 * buffer.numel() * buffer.element_size() for buffer in self.grads.values())


def _places(group: Sequence[nn.Parameter]) -> tuple[list[int], int]:
    starts, at = [], 0
    for parameter in group:
        starts.append(at)
        at += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return starts, at


def _one_dtype(group: Sequence[nn.Parameter]) -> torch.dtype:
    dtypes = {parameter.dtype for parameter in group}
    if len(dtypes) != 1 or len({parameter.device for parameter in group}) != 1:
        raise ValueError(f"a segment needs parameters of one dtype on one device; received {sorted(map(str, dtypes))}")
    return dtypes.pop()


def _move_in(segment: Segment) -> None:
    for parameter, start in zip(segment.parameters, segment.starts, strict=True):
        view = segment.values[start : start + parameter.numel()].view(parameter.shape)
        view.copy_(parameter)
        parameter.data = view
        grad = segment.grads[start : start + parameter.numel()].view(parameter.shape)
        if parameter.grad is not None:
            grad.copy_(parameter.grad)
        parameter.grad = grad
