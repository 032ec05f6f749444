"""Fused linear cross-entropy in a causal language model's forward: training never forms the full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dropforge_kernels.ops import linear_cross_entropy
from dropforge_kernels.patch.engine import Engine
from dropforge_kernels.patch.engine_call import check_shape, final_hidden
from dropforge_kernels.patch.spec import Forward

LogitOptions = Callable[[Any], dict[str, float]]
"""config -> logit_scale and logit_softcap of ``ops.linear_cross_entropy``."""


def needs_plain_head(module: nn.Module) -> str | None:
    """The head must be a linear layer, or PEFT's trained copy of one; an adapter around it computes something else."""
    head = module.get_output_embeddings()
    if type(head).__name__ == "ModulesToSaveWrapper":
        head = head.original_module
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__module__}.{type(head).__qualname__}, not a plain Linear"
    return None if head.bias is None else "its head has a bias"


def needs_own_loss(module: nn.Module) -> str | None:
    """Somebody else's loss function is respected."""
    return None if module.loss_function is ForCausalLMLoss else "its loss function is not the ordinary causal one"


def no_options(config: Any) -> dict[str, float]:
    """Logits as they come out of the head."""
    return {}


def shift(labels: torch.Tensor, *, ignore_index: int) -> torch.Tensor:
    """labels (B, S) moved by one, so that row t holds the token that position t predicts."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def fused_loss(options: LogitOptions = no_options) -> Callable[[Forward], Forward]:
    """A builder for ``PatchSpec``: training with labels takes the fused path, everything else the class's forward."""

    def build(plain: Forward) -> Forward:
        def forward(
            self: nn.Module,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            position_ids: torch.Tensor | None = None,
            past_key_values: Any = None,
            inputs_embeds: torch.Tensor | None = None,
            labels: torch.Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int | torch.Tensor = 0,
            *,
            engine: Engine | None = None,
            max_valid: int | None = None,
            **kwargs: Any,
        ) -> Any:
            inputs = {
                "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs,
            }  # fmt: skip
            whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
            ours = labels is not None and self.training and whole and kwargs.get("return_dict") is not False
            obstacle = needs_plain_head(self) if ours else None
            if obstacle is not None and engine is not None:
                engine.decline(obstacle)
            if not ours or obstacle is not None:
                return plain(self, **inputs, labels=labels, logits_to_keep=logits_to_keep)
            items = inputs.pop("num_items_in_batch", None)
            ignore = inputs.pop("ignore_index", -100)
            targets = inputs.pop("shift_labels", None)
            hidden = None if engine is None else final_hidden(engine, inputs)
            outputs: Any = BaseModelOutputWithPast() if hidden is not None else self.model(**inputs)
            if hidden is None:
                hidden = outputs.last_hidden_state
            if targets is None:
                assert labels is not None
                check_shape("labels", labels, hidden.shape[:-1])
                targets = shift(labels, ignore_index=ignore)
            # A trained copy of the head is fp32; outside autocast it meets hidden states of the compute dtype.
            weight = self.lm_head.weight
            weight = weight.to(hidden.dtype) if engine is None else engine.head_weight(weight, hidden.dtype)
            loss = linear_cross_entropy(
                hidden, weight, targets.reshape(hidden.shape[:-1]).to(hidden.device),
                ignore_index=ignore, num_items_in_batch=items, max_valid=max_valid, **options(self.config),
            )  # fmt: skip
            return CausalLMOutputWithPast(
                loss=loss,
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

        return forward

    return build
