"""TRL's fused language-model head in plain PyTorch, for machines without a GPU: the same outputs from whole logits.

TRL 1.15 computes log-probabilities of labels in a Triton kernel, `model(..., labels=..., fused_lm_head=True)`, which a
CPU cannot run. Memory is that of the logits, (B, S, V) in fp32.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch


def add_plain_head(model: Any) -> None:
    """Make this one model answer `fused_lm_head=True` on a CPU. Call it after a TRL trainer was made around it."""
    from trl.trainer.utils import FusedCausalLMOutput

    fused = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        count = kwargs.pop("num_items_in_batch", None)
        logits = fused(*args, **kwargs).logits.float()
        if shifted is None:
            logits, labels = logits[:, :-1], labels[:, 1:]
        else:
            labels = shifted
        mask = labels != -100
        target = labels.masked_fill(~mask, 0).unsqueeze(-1)
        log_probs = logits.log_softmax(dim=-1)
        picked = log_probs.gather(-1, target).squeeze(-1).masked_fill(~mask, 0.0)
        extra = _extras(logits.detach(), log_probs, target, mask)
        return FusedCausalLMOutput(
            loss=-picked.sum() / (mask.sum().clamp(min=1) if count is None else count),
            log_probs=picked, label_mask=mask, **extra,
        )  # fmt: skip

    model.forward = types.MethodType(forward, model)


def _extras(
    logits: torch.Tensor, log_probs: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The fields that TRL logs; (B, S), zero where nothing is learnt. Entropy keeps its gradient."""
    probs = log_probs.exp()
    fields = {
        "entropy": -(probs * log_probs).sum(dim=-1),
        "log_sum_sq_probs": (2 * log_probs.detach()).logsumexp(dim=-1),
        "mean_logits": logits.mean(dim=-1),
    }
    zeroed = {name: value.masked_fill(~mask, 0.0) for name, value in fields.items()}
    return {**zeroed, "is_top1": (logits.argmax(dim=-1, keepdim=True) == target).squeeze(-1) & mask}
