"""From the trainer's optimizer arguments to FlatAdamW, or to flat gradients under another optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dropforge.fast_step.flat import FlatParameters
from dropforge.fast_step.optimizer import FlatAdamW
from dropforge.parameter_groups import parameter_groups

EIGHT_BIT = {"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"}
THIRTY_TWO_BIT = {"adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adamw_hf"}


def flat_optimizer(trainer: Any, model: nn.Module) -> tuple[FlatParameters, FlatAdamW | None, str]:
    """(flat buffers, optimizer or None when the trainer must make its own, description for the report)."""
    args = trainer.args
    name = str(getattr(args.optim, "value", args.optim))
    if name not in EIGHT_BIT | THIRTY_TWO_BIT or trainer.optimizer_cls_and_kwargs is not None or args.optim_args:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in trained:
            groups.setdefault(parameter.dtype, []).append(parameter)
        return FlatParameters(list(groups.values())), None, f"{name}: the trainer's own, over flat gradients"
    bits = 8 if name in EIGHT_BIT else 32
    embeddings = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
    optimizer = FlatAdamW(
        parameter_groups(model, args),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        bits=bits,
        max_grad_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
        keep_32_bit=embeddings,  # as transformers does for bitsandbytes
    )
    return optimizer.flat, optimizer, f"{name}: flat AdamW, {bits}-bit states, norm and clip on the device"
