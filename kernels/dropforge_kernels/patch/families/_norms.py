"""RMSNorm forwards for the families."""

from __future__ import annotations

import torch
from torch import nn

from dropforge_kernels.ops import rms_norm
from dropforge_kernels.patch.spec import Forward


def llama_norm(plain: Forward) -> Forward:
    """Norms that round to the input's dtype before the weight, with ``variance_epsilon``."""

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype != hidden_states.dtype:
            # The model's own norm then answers in the wider dtype of the two; ours would answer in the input's.
            return plain(self, hidden_states)
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

    return forward


def gemma_norm(plain: Forward) -> Forward:
    """Norms whose weight is an offset from 1 and that round once, with ``eps``."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, eps=self.eps, offset=1.0, rounding="gemma")

    return forward
