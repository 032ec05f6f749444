"""Where a layer's frozen matrices come from: joined 16-bit tensors, or NF4 dequantised into one scratch buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dropforge_kernels.modules.layer import Weights
from dropforge_kernels.ops import nf4_dequantize_group, nf4_group
from dropforge_kernels.ops.nf4_group import Nf4Group
from dropforge_kernels.reference.nf4_group import Nf4Weight


@dataclass(frozen=True)
class Matrices:
    """The parameters of one layer's projections, group by group, in the order of the groups' parts."""

    qkv: tuple[nn.Parameter, ...]
    o: nn.Parameter
    gate_up: tuple[nn.Parameter, ...]
    down: nn.Parameter

    @property
    def all(self) -> tuple[nn.Parameter, ...]:
        return (*self.qkv, self.o, *self.gate_up, self.down)


class DenseWeights:
    """16- or 32-bit parameters. Those of a group are moved into one tensor, of which they become row slices.

    The parameters stay what they are to everybody else: same objects, shapes and values, contiguous. ``release`` gives
    each its own memory back.
    """

    def __init__(self, matrices: Matrices) -> None:
        self._matrices = matrices
        self._weights = Weights(
            qkv=_joined(matrices.qkv),
            o=matrices.o.data,
            gate_up=_joined(matrices.gate_up),
            down=matrices.down.data,
        )

    def __call__(self) -> Weights:
        return self._weights

    def release(self) -> None:
        for group in (self._matrices.qkv, self._matrices.gate_up):
            if len(group) > 1:
                for parameter in group:
                    parameter.data = parameter.data.clone()


def _joined(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    if len(parameters) == 1:
        return parameters[0].data
    whole = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + parameter.shape[0]]
        start += parameter.shape[0]
    return whole


class Scratch:
    """One flat buffer for the dequantised matrices of whichever layer works at the moment."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffer: torch.Tensor | None = None
        self._wanted = 0
        self.owner: object = None

    def reserve(self, numel: int) -> None:
        """Make room for a layer of so many values."""
        self._wanted = max(self._wanted, numel)

    def buffer(self, device: torch.device) -> torch.Tensor:
        """The buffer, allocated at the first call."""
        if self._buffer is None or self._buffer.numel() < self._wanted:
            self._buffer = torch.empty(self._wanted, dtype=self.dtype, device=device)
        return self._buffer


class Nf4Weights:
    """bitsandbytes' NF4 parameters of one layer, dequantised together in one launch at every call.

    Two calls in a row for the same layer (the backward of the last layer right after its forward) dequantise once.
    """

    def __init__(self, matrices: Matrices, scratch: Scratch) -> None:
        self._group = _group(matrices)
        self._counts = (len(matrices.qkv), len(matrices.gate_up))
        self._scratch = scratch
        self._seen: torch.Tensor | None = None
        self._weights: Weights | None = None
        scratch.reserve(self._group.numel)

    def __call__(self) -> Weights:
        buffer = self._scratch.buffer(self._group.table.device)
        if self._scratch.owner is not self:
            nf4_dequantize_group(self._group, buffer)
            self._scratch.owner = self
        if self._seen is not buffer or self._weights is None:
            self._seen, self._weights = buffer, self._cut(buffer)
        return self._weights

    def _cut(self, buffer: torch.Tensor) -> Weights:
        shapes = [weight.shape for weight in self._group.weights]
        qkv, gate_up = self._counts
        groups = (shapes[:qkv], shapes[qkv : qkv + 1], shapes[qkv + 1 : qkv + 1 + gate_up], shapes[qkv + 1 + gate_up :])
        joined, start = [], 0
        for group in groups:
            rows, width = sum(shape[0] for shape in group), group[0][1]
            joined.append(buffer[start : start + rows * width].view(rows, width))
            start += rows * width
        return Weights(qkv=joined[0], o=joined[1], gate_up=joined[2], down=joined[3])

    def release(self) -> None:
        """Nothing was moved."""


def _group(matrices: Matrices) -> Nf4Group:
    states = [parameter.quant_state for parameter in matrices.all]  # type: ignore[attr-defined]
    weights = [
        Nf4Weight(
            packed=parameter.data, absmax=state.absmax, nested_absmax=state.state2.absmax,
            nested_offset=state.offset.reshape(1), shape=tuple(state.shape),
        )
        for parameter, state in zip(matrices.all, states, strict=True)
    ]  # fmt: skip
    first = states[0]
    return nf4_group(
        weights, code=first.code, nested_code=first.state2.code,
        blocksize=first.blocksize, nested_blocksize=first.state2.blocksize,
    )  # fmt: skip


def nf4_obstacle(parameter: nn.Parameter) -> str | None:
    """Why an NF4 parameter cannot be read by ``Nf4Weights``, or None."""
    state = getattr(parameter, "quant_state", None)
    if state is None or state.quant_type != "nf4":
        return "its weight is not NF4"
    if state.state2 is None:
        return "its NF4 scales are not quantised themselves"
    return None if state.shape.numel() % 2048 == 0 else "its size is not a multiple of 2,048 values"
