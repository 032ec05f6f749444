"""Cross-entropy of hidden states through a head in plain PyTorch: forms the full logits. See
ops/linear_cross_entropy.py.
"""

from __future__ import annotations

import torch

from dropforge_kernels.reference.cross_entropy import cross_entropy


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    max_valid: int | None = None,
    skip_ignored: bool = True,
    memory_budget: int | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ops.linear_cross_entropy; ``max_valid``, ``skip_ignored`` and ``memory_budget`` change nothing here."""
    if count is not None:
        count.copy_((target != ignore_index).sum())
    return cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias),
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
    )
