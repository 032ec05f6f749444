"""Which trained parameters learn at which rate and with which decay.

Embeddings and head, trained in full, want a rate 2 to 10 times smaller than LoRA matrices: each token's row is met
rarely and holds what pretraining put there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from dropforge.errors import CommandError

if TYPE_CHECKING:
    import torch
    from torch import nn

# As in transformers' Trainer: neither biases nor norms decay.
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


class Rates(Protocol):
    """What decides the groups; a job's train section and transformers' TrainingArguments both have it."""

    @property
    def learning_rate(self) -> float | None: ...
    @property
    def weight_decay(self) -> float: ...


def embedding_rate(train: object) -> float | None:
    """`embedding_learning_rate` of a train section or of training arguments; None: embeddings learn like the rest."""
    rate = getattr(train, "embedding_learning_rate", None)
    return None if rate is None else float(rate)


def parameter_groups(model: nn.Module, train: Rates) -> list[dict[str, Any]]:
    """torch's parameter groups of everything that requires a gradient: at most four, none empty.

    Each has params, lr and weight_decay: those that decay and those that do not, at `learning_rate`; then the same of
    the input embedding and the output head, at `embedding_learning_rate`. Schedulers scale each lr by the same factor.

    Raises CommandError api-embedding-rate: such a rate is given, but neither embedding nor head is trained.
    """
    from torch import nn
    from transformers.trainer_pt_utils import get_parameter_names

    decaying = set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY)))
    rate = embedding_rate(train)
    apart = _embedding_parameters(model) if rate is not None else set()
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in apart, name not in decaying), []).append(parameter)
    if rate is not None and not any(embedding for embedding, _ in groups):
        raise CommandError(
            f"embedding_learning_rate={rate:g} has nothing to train", code="api-embedding-rate",
            where="embedding_learning_rate", why="neither the embedding nor the head of this model is trained",
            fix="add embed_tokens and lm_head to the target modules, or leave the rate out",
        )  # fmt: skip
    return [
        {
            "params": groups[embedding, plain],
            "lr": rate if embedding else train.learning_rate,
            "weight_decay": 0.0 if plain else train.weight_decay,
        }
        for embedding, plain in sorted(groups)
    ]


def _embedding_parameters(model: Any) -> set[int]:
    """ids of the parameters of the embedding and the head, their copies and their own LoRA matrices."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}


def regroup(optimizer: torch.optim.Optimizer, model: nn.Module, train: Rates) -> None:
    """Give an optimizer that has not stepped yet the groups of ``parameter_groups``; its other options stay."""
    groups = parameter_groups(model, train)
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


class EmbeddingRateMixin:
    """For transformers' Trainer: `args.embedding_learning_rate` gives embeddings and head groups of their own."""

    args: Any
    model: Any
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's own optimizer, regrouped when a rate of embeddings is given."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if made and embedding_rate(self.args) is not None:
            regroup(optimizer, model or self.model, self.args)
        return optimizer
