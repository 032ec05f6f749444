"""The LoRA matrices of a model in the compute dtype, cast from their fp32 masters once per forward.

A model has hundreds of them, most of them small, so launches count more than bytes. Matrices whose copy is dense go
together through one multi-tensor copy. The B matrices of a group lie in blocks of a larger matrix, which that cannot
write; but layers are alike, so the larger matrices of all layers lie one behind the other, and the same block of all of
them is written by two launches: the masters joined, then one strided copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from dropforge_kernels.modules.projection import Group, Part


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """One projection as the model has it."""

    outputs: int
    bias: torch.Tensor | None
    a: nn.Parameter | None = None
    """(r, K); None without an adapter."""
    b: nn.Parameter | None = None
    """(n, r)."""
    scale: float = 1.0


@dataclass(frozen=True)
class Block:
    """The same part of a group's B in several layers."""

    columns: slice
    ranks: slice
    masters: list[nn.Parameter]


@dataclass
class Stack:
    """The B matrices of alike groups, one per layer: (layers, N, R), zeros outside the blocks."""

    whole: torch.Tensor
    blocks: tuple[Block, ...]
    used: int = 0

    def refresh(self) -> None:
        for block in self.blocks:
            joined = torch.cat([master.detach() for master in block.masters])
            target = self.whole[: self.used, block.columns, block.ranks]
            target.copy_(joined.view(target.shape))


@dataclass
class Casts:
    """Copies of all the model's adapter matrices in the compute dtype, refreshed by one call.

    layers: how many layers will ask for groups; alike groups beyond that many begin a new stack.
    """

    dtype: torch.dtype
    layers: int = 1
    _copies: list[torch.Tensor] = field(default_factory=list)
    _masters: list[nn.Parameter] = field(default_factory=list)
    _scaled: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    _stacks: dict[tuple[object, ...], list[Stack]] = field(default_factory=dict)

    def group(self, projections: tuple[Adapted, ...]) -> Group:
        """The group of these projections; its tensors hold values after the next ``refresh``."""
        ranks = [0 if p.a is None else p.a.shape[0] for p in projections]
        parts, column, row = [], 0, 0
        for projection, rank in zip(projections, ranks, strict=True):
            columns, rows = slice(column, column + projection.outputs), slice(row, row + rank)
            parts.append(Part(columns=columns, ranks=rows, scale=projection.scale, adapted=rank > 0))
            column, row = columns.stop, rows.stop
        a = self._a(projections, parts) if row else None
        b = self._b(projections, parts) if row else None
        return Group(parts=tuple(parts), outputs=column, a=a, b=b, bias=self._bias(projections))

    def _a(self, projections: tuple[Adapted, ...], parts: list[Part]) -> torch.Tensor:
        first = next(p.a for p in projections if p.a is not None)
        whole = first.new_empty(parts[-1].ranks.stop, first.shape[1], dtype=self.dtype)
        for projection, part in zip(projections, parts, strict=True):
            if projection.a is not None:
                self._copies.append(whole[part.ranks])
                self._masters.append(projection.a)
                if part.scale != 1.0:
                    self._scaled.append((whole[part.ranks], part.scale))
        return whole

    def _b(self, projections: tuple[Adapted, ...], parts: list[Part]) -> torch.Tensor:
        masters = [p.b for p in projections if p.b is not None]
        adapted = [part for part in parts if part.adapted]
        shape = parts[-1].columns.stop, parts[-1].ranks.stop
        if masters[0].shape == shape:  # one part: its copy is dense
            self._copies.append(masters[0].new_empty(shape, dtype=self.dtype))
            self._masters.append(masters[0])
            return self._copies[-1]
        key = (shape, masters[0].device, *((part.columns.start, part.ranks.start, part.ranks.stop) for part in adapted))
        stacks = self._stacks.setdefault(key, [])
        if not stacks or stacks[-1].used == self.layers:
            blocks = tuple(Block(part.columns, part.ranks, []) for part in adapted)
            stacks.append(Stack(masters[0].new_zeros(self.layers, *shape, dtype=self.dtype), blocks))
        stack = stacks[-1]
        for block, master in zip(stack.blocks, masters, strict=True):
            block.masters.append(master)
        stack.used += 1
        return stack.whole[stack.used - 1]

    def _bias(self, projections: tuple[Adapted, ...]) -> torch.Tensor | None:
        given = [p.bias for p in projections if p.bias is not None]
        if not given:
            return None
        whole = [given[0].new_zeros(p.outputs) if p.bias is None else p.bias.detach() for p in projections]
        return torch.cat(whole).to(self.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters' present values."""
        if self._copies:
            torch._foreach_copy_(self._copies, [master.detach() for master in self._masters])
        for stacks in self._stacks.values():
            for stack in stacks:
                stack.refresh()
        if self._scaled:
            scales = [scale for _, scale in self._scaled]
            torch._foreach_mul_([copy for copy, _ in self._scaled], scales)
