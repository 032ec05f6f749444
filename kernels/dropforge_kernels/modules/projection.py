"""Projections of one input with LoRA: one product with the frozen weights, low-rank passes shared by the group.

Legend: T tokens, K inputs, N outputs of the whole group, n outputs of one part, R sum of ranks, r rank of one part.

Forward:   low = x A^T  (A: the parts' rows one below the other, times their scale);   y = x W^T + bias + low B^T
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
    b: torch.Tensor | None = None
    """(n, r), compute dtype; None without an adapter."""
    bias: torch.Tensor | None = None
    """(n,), compute dtype, frozen."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Projections that share their input."""

    parts: tuple[Part, ...]
    outputs: int
    a: torch.Tensor | None
    """(R, K), compute dtype, each part's rows already multiplied by its scale; None when no part has an adapter."""


def forward(
    group: Group, x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None, alpha: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (T, K), weight (N, K) -> (y (T, N), low (T, R) or None).

    residual: (T, N), for groups of one part: y = residual + alpha * projection; it is not overwritten.
    """
    low = None if group.a is None else x @ group.a.t()
    if residual is not None:
        return _onto(group, x, low, weight, residual, alpha), low
    if group.a is None and all(part.bias is None for part in group.parts):
        return x @ weight.t(), None
    y = x.new_empty(x.shape[0], group.outputs)
    for part in group.parts:
        _start(part, y[:, part.columns], low)
    return y.addmm_(x, weight.t()), low


def _start(part: Part, y: torch.Tensor, low: torch.Tensor | None) -> None:
    """What one part's outputs hold before the product with W."""
    if part.b is None or low is None:
        y.zero_() if part.bias is None else y.copy_(part.bias)
    elif part.bias is None:
        torch.mm(low[:, part.ranks], part.b.t(), out=y)
    else:
        torch.addmm(part.bias, low[:, part.ranks], part.b.t(), out=y)


def _onto(
    group: Group, x: torch.Tensor, low: torch.Tensor | None, weight: torch.Tensor, residual: torch.Tensor, alpha: float
) -> torch.Tensor:
    (part,) = group.parts
    if part.bias is not None:
        residual = torch.add(residual, part.bias, alpha=alpha)
    if low is None or part.b is None:
        return torch.addmm(residual, x, weight.t(), alpha=alpha)
    return torch.addmm(residual, low, part.b.t(), alpha=alpha).addmm_(x, weight.t(), alpha=alpha)


@dataclass
class Gradients:
    """Of a group's adapters, fp32, in the order of its parts; tiles of rows add up."""

    a: torch.Tensor | None = None
    """(R, K), before the parts' scales."""
    b: list[torch.Tensor] | None = None

    def add(self, other: Gradients) -> None:
        """Add another tile's gradients."""
        if self.a is None or self.b is None or other.a is None or other.b is None:
            self.a, self.b = other.a, other.b
            return
        self.a.add_(other.a)
        for mine, theirs in zip(self.b, other.b, strict=True):
            mine.add_(theirs)

    def per_parameter(self, group: Group) -> list[torch.Tensor]:
        """dA and dB of every part that has an adapter: [dA, dB, dA, dB, ...]."""
        result: list[torch.Tensor] = []
        adapted = [part for part in group.parts if part.b is not None]
        if not adapted:
            return result
        assert self.a is not None and self.b is not None
        for part, db in zip(adapted, self.b, strict=True):
            da = self.a[part.ranks]
            result += [da if part.scale == 1.0 else da * part.scale, db]
        return result


def backward_inputs(
    group: Group, dy: torch.Tensor, weight: torch.Tensor, *, wants_dx: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dy (T, N), weight (N, K) -> (dx (T, K) or None, dlow (T, R) or None without adapters)."""
    if group.a is None:
        return (dy @ weight if wants_dx else None), None
    dlow = dy.new_empty(dy.shape[0], group.a.shape[0])
    for part in group.parts:
        if part.b is not None:
            torch.mm(dy[:, part.columns], part.b, out=dlow[:, part.ranks])
    if not wants_dx:
        return None, dlow
    return (dlow @ group.a).addmm_(dy, weight), dlow


def backward_adapters(
    group: Group, dy: torch.Tensor, dlow: torch.Tensor | None, x: torch.Tensor, low: torch.Tensor | None = None
) -> Gradients:
    """The adapters' gradients from dy (T, N), dlow of ``backward_inputs``, x (T, K) and low (computed when None)."""
    if group.a is None or dlow is None:
        return Gradients()
    if low is None:
        low = x @ group.a.t()
    db = [wide_mm(dy[:, p.columns].t(), low[:, p.ranks]) for p in group.parts if p.b is not None]
    return Gradients(wide_mm(dlow.t(), x), db)


def wide_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right with an fp32 result, whatever the inputs' dtype."""
    if left.dtype is torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
