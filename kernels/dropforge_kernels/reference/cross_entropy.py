"""Cross-entropy over rows of logits in plain PyTorch; see ops/cross_entropy.py for the arguments."""

from __future__ import annotations

import torch

REDUCTIONS = ("mean", "sum", "none")


def widen(x: torch.Tensor) -> torch.Tensor:
    """fp32, or fp64 where the input is fp64 (the truth of the tests)."""
    return x if x.dtype is torch.float64 else x.float()


def scaled_logits(logits: torch.Tensor, logit_scale: float, logit_softcap: float) -> torch.Tensor:
    """softcap * tanh(scale * x / softcap), or scale * x without a soft-cap; fp32."""
    z = widen(logits) * logit_scale
    return logit_softcap * torch.tanh(z / logit_softcap) if logit_softcap > 0 else z


def row_nll(
    z: torch.Tensor, target: torch.Tensor, *, ignore_index: int, label_smoothing: float, z_loss_weight: float
) -> torch.Tensor:
    """Loss of each row of scaled logits z (N, V); 0 where the target is ignore_index. Raises IndexError for a target
    outside [0, V).
    """
    live = target != ignore_index
    safe = torch.where(live, target, 0).long()
    if z.shape[0] and bool(((safe < 0) | (safe >= z.shape[1])).any()):
        raise IndexError(f"cross_entropy: a target is outside [0, {z.shape[1]}) and is not ignore_index {ignore_index}")
    lse = torch.logsumexp(z, dim=-1)
    nll = (1 - label_smoothing) * (lse - z.gather(1, safe[:, None]).squeeze(1)) + z_loss_weight * lse * lse
    if label_smoothing > 0:
        nll = nll + label_smoothing * (lse - z.mean(dim=-1))
    return torch.where(live, nll, torch.zeros_like(nll))


def reduce_nll(
    nll: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: torch.Tensor | float | None,
) -> torch.Tensor:
    """The sum over max(divisor, 1): num_items_in_batch if given, else the rows that count ("mean") or 1 ("sum")."""
    if reduction == "none":
        return nll
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch, dtype=nll.dtype, device=nll.device).reshape(())
    elif reduction == "mean":
        divisor = (target != ignore_index).sum().to(nll.dtype)
    else:
        return nll.sum()
    return nll.sum() / divisor.clamp_min(1)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    inplace_gradient: bool = False,
) -> torch.Tensor:
    """As ops.cross_entropy; ``inplace_gradient`` changes nothing here."""
    z = scaled_logits(logits.reshape(-1, logits.shape[-1]), logit_scale, logit_softcap)
    flat = target.reshape(-1)
    nll = row_nll(z, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss_weight=z_loss_weight)
    loss = reduce_nll(nll, flat, ignore_index=ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch)
    return loss.view(target.shape) if reduction == "none" else loss
