"""Log-probabilities and entropy of hidden states through a head in plain PyTorch. See ops/linear_logprobs.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dropforge_kernels.reference.cross_entropy import row_nll, scaled_logits


class LogProbs(NamedTuple):
    """Per token, fp32, in the shape of the targets: log p(target), and the entropy of the distribution (None unless
    asked for).
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    return_entropy: bool = False,
    entropy_gradient: bool = False,
    max_valid: int | None = None,
    skip_ignored: bool = True,
    memory_budget: int | None = None,
) -> LogProbs:
    """As ops.linear_logprobs; ``max_valid``, ``skip_ignored`` and ``memory_budget`` change nothing here."""
    flat = target.reshape(-1)
    z = scaled_logits(hidden.reshape(-1, hidden.shape[-1]) @ weight.t(), logit_scale, logit_softcap)
    nll = row_nll(z, flat, ignore_index=ignore_index, label_smoothing=0.0, z_loss_weight=0.0)
    if not return_entropy:
        return LogProbs(-nll.view(target.shape), None)
    z = z if entropy_gradient else z.detach()
    log_p = z - torch.logsumexp(z, dim=-1, keepdim=True)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
    entropy = torch.where(flat != ignore_index, entropy, torch.zeros_like(entropy))
    return LogProbs(-nll.view(target.shape), entropy.view(target.shape))
