"""Projections of one input with LoRA: one product with the frozen weights, low-rank passes shared by the group.

Legend: T tokens, K inputs, N outputs of the whole group, R sum of the parts' ranks.

Forward:   low = x A^T  (A: the parts' rows one below the other, times their scale; B: block-diagonal)
           y = x W^T + bias + low B^T
Backward:  dlow = dy B;   dx = dy W + dlow A;   dA = scale dlow^T x;   dB = dy^T low
The low-rank term is written first and the product with W added onto it inside the matrix product (beta = 1), so that
y and dx are written twice and read once, without an addition of their own; a residual takes the place of a zero start
in the same way. Gradients of A and B leave in fp32.
Source: Hu et al. 2021 (arXiv 2106.09685); the order of the products is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Part:
    """One projection of a group."""

    columns: slice
    """Its outputs among the group's N."""
    ranks: slice
    """Its columns of the low-rank product; empty without an adapter."""
    scale: float = 1.0
    adapted: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """Projections that share their input."""

    parts: tuple[Part, ...]
    outputs: int
    a: torch.Tensor | None
    """(R, K), compute dtype, each part's rows already multiplied by its scale; None when no part has an adapter."""
    b: torch.Tensor | None
    """(N, R), compute dtype: each part's B in its own rows and columns, zeros elsewhere. One product with it costs less
    than one per part: fewer launches, and the ranks of a part alone would not fill a tile."""
    bias: torch.Tensor | None = None
    """(N,), compute dtype, frozen."""


def forward(
    group: Group, x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None, alpha: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (T, K), weight (N, K) -> (y (T, N), low (T, R) or None).

    residual: (T, N): y = residual + alpha * projection; it is not overwritten.
    """
    low = None if group.a is None else x @ group.a.t()
    if residual is not None:
        return _onto(group, x, low, weight, residual, alpha), low
    if low is None or group.b is None:
        return (x @ weight.t() if group.bias is None else torch.addmm(group.bias, x, weight.t())), None
    start = low @ group.b.t() if group.bias is None else torch.addmm(group.bias, low, group.b.t())
    return start.addmm_(x, weight.t()), low


def _onto(
    group: Group, x: torch.Tensor, low: torch.Tensor | None, weight: torch.Tensor, residual: torch.Tensor, alpha: float
) -> torch.Tensor:
    if group.bias is not None:
        residual = torch.add(residual, group.bias, alpha=alpha)
    if low is None or group.b is None:
        return torch.addmm(residual, x, weight.t(), alpha=alpha)
    return torch.addmm(residual, low, group.b.t(), alpha=alpha).addmm_(x, weight.t(), alpha=alpha)


@dataclass
class Gradients:
    """Of a group's adapters, fp32; tiles of rows add up."""

    a: torch.Tensor | None = None
    """(R, K), before the parts' scales."""
    b: torch.Tensor | None = None
    """(N, R); what lies outside the parts' own blocks means nothing."""

    def add(self, other: Gradients) -> None:
        """Add another tile's gradients."""
        if self.a is None or self.b is None or other.a is None or other.b is None:
            self.a, self.b = other.a, other.b
            return
        self.a.add_(other.a)
        self.b.add_(other.b)

    def per_parameter(self, group: Group) -> list[torch.Tensor]:
        """dA and dB of every part that has an adapter: [dA, dB, dA, dB, ...]. Once only: ``a`` is scaled in place."""
        parts = [part for part in group.parts if part.adapted]
        if not parts:
            return []
        assert self.a is not None and self.b is not None
        if len({part.scale for part in parts}) == 1:  # as good as always: one launch for the group
            if parts[0].scale != 1.0:
                self.a.mul_(parts[0].scale)
        else:
            for part in parts:
                self.a[part.ranks].mul_(part.scale)
        return [half for part in parts for half in (self.a[part.ranks], self.b[part.columns, part.ranks])]


def backward_inputs(
    group: Group, dy: torch.Tensor, weight: torch.Tensor, *, wants_dx: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dy (T, N), weight (N, K) -> (dx (T, K) or None, dlow (T, R) or None without adapters)."""
    if group.a is None or group.b is None:
        return (dy @ weight if wants_dx else None), None
    dlow = dy @ group.b
    return ((dlow @ group.a).addmm_(dy, weight) if wants_dx else None), dlow


def backward_adapters(
    group: Group, dy: torch.Tensor, dlow: torch.Tensor | None, x: torch.Tensor, low: torch.Tensor | None = None
) -> Gradients:
    """The adapters' gradients from dy (T, N), dlow of ``backward_inputs``, x (T, K) and low (computed when None)."""
    if group.a is None or dlow is None:
        return Gradients()
    if low is None:
        low = x @ group.a.t()
    return Gradients(wide_mm(dlow.t(), x), wide_mm(dy.t(), low))


def wide_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right with an fp32 result, whatever the inputs' dtype."""
    if left.dtype is torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
