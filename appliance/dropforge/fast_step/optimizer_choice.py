"""From the trainer's optimizer arguments to FlatAdamW, or to flat gradients under another optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dropforge.fast_step.flat import FlatParameters
from dropforge.fast_step.optimizer import FlatAdamW

EIGHT_BIT = {"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"}
THIRTY_TWO_BIT = {"adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adamw_hf"}


def flat_optimizer(
    trainer: Any, model: nn.Module, *, embedding_learning_rate: float | None
) -> tuple[FlatParameters, FlatAdamW | None, str]:
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
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    optimizer = FlatAdamW(
        _groups(trainer, model, embedding_learning_rate),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        bits=bits,
        max_grad_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
        keep_32_bit=embeddings,  # as transformers does for bitsandbytes
    )
    return optimizer.flat, optimizer, f"{name}: flat AdamW, {bits}-bit states, norm and clip on the device"


def _groups(trainer: Any, model: nn.Module, embedding_learning_rate: float | None) -> list[dict[str, Any]]:
    """As transformers groups them: with weight decay, without, and embeddings under their own rate."""
    decayed = set(trainer.get_decay_parameter_names(model))
    heads: Any = model
    own = {id(p) for m in (heads.get_input_embeddings(), heads.get_output_embeddings()) if m is not None
           for p in m.parameters()} if embedding_learning_rate is not None else set()  # fmt: skip
    sorted_out: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sorted_out.setdefault((id(parameter) in own, name not in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if without else trainer.args.weight_decay,
            **({"lr": embedding_learning_rate} if embedding else {}),
        }
        for (embedding, without), parameters in sorted(sorted_out.items(), key=lambda item: item[0])
    ]
