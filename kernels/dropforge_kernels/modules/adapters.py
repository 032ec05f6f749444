"""The LoRA matrices of a model in the compute dtype, cast from their fp32 masters once per forward."""

from __future__ import annotations

from dataclasses import dataclass

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


class Casts:
    """Copies of all the model's adapter matrices in the compute dtype, refreshed by one call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._copies: list[torch.Tensor] = []
        self._masters: list[nn.Parameter] = []
        self._scaled: list[tuple[torch.Tensor, float]] = []

    def group(self, projections: tuple[Adapted, ...]) -> Group:
        """The group of these projections; its tensors hold values after the next ``refresh``."""
        ranks = [0 if p.a is None else p.a.shape[0] for p in projections]
        outputs = sum(p.outputs for p in projections)
        a = b = None
        if sum(ranks):
            first = next(p.a for p in projections if p.a is not None)
            a = first.new_empty(sum(ranks), first.shape[1], dtype=self._dtype)
            b = first.new_zeros(outputs, sum(ranks), dtype=self._dtype)
        parts, column, row = [], 0, 0
        for projection, rank in zip(projections, ranks, strict=True):
            columns, rows = slice(column, column + projection.outputs), slice(row, row + rank)
            if projection.a is not None and projection.b is not None and a is not None and b is not None:
                self._copies += [a[rows], b[columns, rows]]
                self._masters += [projection.a, projection.b]
                if projection.scale != 1.0:
                    self._scaled.append((a[rows], projection.scale))
            parts.append(Part(columns=columns, ranks=rows, scale=projection.scale, adapted=rank > 0))
            column, row = columns.stop, rows.stop
        return Group(parts=tuple(parts), outputs=outputs, a=a, b=b, bias=self._bias(projections))

    def _bias(self, projections: tuple[Adapted, ...]) -> torch.Tensor | None:
        given = [p.bias for p in projections if p.bias is not None]
        if not given:
            return None
        whole = [given[0].new_zeros(p.outputs) if p.bias is None else p.bias.detach() for p in projections]
        return torch.cat(whole).to(self._dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters' present values."""
        if not self._copies:
            return
        torch._foreach_copy_(self._copies, [master.detach() for master in self._masters])
        if self._scaled:
            scales = [scale for _, scale in self._scaled]
            torch._foreach_mul_([copy for copy, _ in self._scaled], scales)
