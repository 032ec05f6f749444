"""RMSNorm for hand-written layers: forward and backward as two calls, without autograd's graph between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dropforge_kernels import reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops.rms_norm import rms_norm_backward, rms_norm_forward


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A frozen RMSNorm."""

    weight: torch.Tensor
    """(H,)."""
    eps: float
    offset: float = 0.0
    rounding: str = "llama"

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (T, H) -> (normalised x, the rows' 1 / root mean square for ``backward``; None outside Triton)."""
        if choose("rms_norm", x).backend is Backend.REFERENCE:
            return self._reference(x), None
        y, _, rstd = rms_norm_forward(x, self.weight, self.eps, self.offset, self.rounding == "llama")
        return y, rstd

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor | None, *, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The gradient of x, plus ``onto`` (the gradient that reaches x past the norm) in the same pass."""
        if rstd is not None:
            return rms_norm_backward(dy, x, self.weight, rstd, self.offset, False, onto)[0]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = self._reference(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        return dx if onto is None else dx + onto

    def _reference(self, x: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x, self.weight, eps=self.eps, offset=self.offset, rounding=self.rounding)
