"""Losses of the GRPO family from log-probabilities, in plain PyTorch; see ops/grpo_loss.py for the formulas."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from dropforge_kernels.reference.cross_entropy import widen

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
EXPONENT_LIMIT = 20.0


class GrpoLoss(NamedTuple):
    """loss: scalar to differentiate. The rest are detached means over the tokens that count: the KL estimate (0 with
    beta = 0), and the shares of tokens whose ratio was clipped from below (negative advantage) and from above
    (positive advantage).
    """

    loss: torch.Tensor
    kl: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def ratio_bounds(loss_type: str, epsilon: float, epsilon_high: float) -> tuple[float, float]:
    """The ratios beyond which a token counts as clipped: none with sapo and vespo; cispo names its upper one."""
    if loss_type in ("sapo", "vespo"):
        return 0.0, float("inf")
    return (0.0, epsilon_high) if loss_type == "cispo" else (1 - epsilon, 1 + epsilon_high)


def grpo_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    max_completion_length: int | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_pos: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> GrpoLoss:
    """As ops.grpo_loss."""
    logp = widen(logprobs)
    live = mask.bool()
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    logp = torch.where(live, logp, zero)  # before any exponential
    old = logp.detach() if old_logprobs is None else torch.where(live, old_logprobs.to(logp.dtype), zero)
    advantage = advantages.to(logp.dtype)[:, None]
    tokens = live.sum(1, keepdim=True).clamp_min(1).to(logp.dtype)
    log_ratio = logp - old
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / tokens
    ratio = log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    low, high = ratio_bounds(loss_type, epsilon, epsilon if epsilon_high is None else epsilon_high)
    if loss_type == "cispo":
        per_token = -ratio.clamp(max=high).detach() * advantage * logp
    elif loss_type == "vespo":
        total = (logp - old).detach().clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).sum(1, keepdim=True)
        log_weight = total.clamp(math.log(1e-8), EXPONENT_LIMIT)
        k = torch.where(advantage >= 0, vespo_k_pos, vespo_k_neg).to(logp.dtype)
        decay = torch.where(advantage >= 0, vespo_lambda_pos, vespo_lambda_neg).to(logp.dtype)
        per_token = -(decay + k * log_weight - decay * log_weight.exp()).exp() * advantage * logp
    elif loss_type == "sapo":
        tau = torch.where(advantage > 0, sapo_temperature_pos, sapo_temperature_neg).to(logp.dtype)
        per_token = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        per_token = -torch.minimum(bounded * advantage, ratio.clamp(low, high) * advantage)
    kl = torch.zeros_like(logp)
    if beta > 0:
        difference = torch.where(live, ref_logprobs.to(logp.dtype), zero) - logp
        kl = difference.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp() - difference - 1
        per_token = per_token + beta * kl
    per_token = torch.where(live, per_token, zero)
    counted = live.sum().to(logp.dtype)
    if loss_type in ("grpo", "sapo"):
        loss = (per_token.sum(1, keepdim=True) / tokens).sum() / max(1, logp.shape[0])
    elif loss_type == "luspo":
        loss = per_token.sum() / max(1, logp.shape[0])
    elif loss_type == "bnpo":
        loss = per_token.sum() / counted.clamp_min(1)
    elif loss_type == "dr_grpo":
        loss = per_token.sum() / max(1, logp.shape[0] * max_completion_length)
    else:
        items = (
            counted
            if num_items_in_batch is None
            else torch.as_tensor(num_items_in_batch, dtype=logp.dtype, device=logp.device)
        )
        loss = per_token.sum() / items.reshape(()).clamp_min(1)
    share = counted.clamp_min(1)
    clipped_low = ((ratio < low) & (advantage < 0) & live).sum() / share
    clipped_high = ((ratio > high) & (advantage > 0) & live).sum() / share
    return GrpoLoss(loss, (torch.where(live, kl, zero).sum() / share).detach(), clipped_low, clipped_high)
