"""Put a fresh LoRA adapter on a loaded model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from dropforge.errors import CommandError
from dropforge.fast.adapter import EMBEDDINGS, Switches, choose_targets, hold_in_fp32, lora_config, within_layers
from dropforge.fast.adapter_base import describe_base
from dropforge.fast.checks import check_layers, check_lora, check_modules, check_name_patterns, check_offload
from dropforge.fast.repeated import keep_adapter
from dropforge.fast.state import ModelState, needed_state
from dropforge.models.plain_lora import initial_pairs

LOG = logging.getLogger("dropforge")
LOFTQ_BITS = 4


def attach(
    model: Any, *, targets: str | Iterable[str] | None, modules_to_save: Iterable[str] | None, switches: Switches,
    layers: int | Iterable[int] | None, last_layers: int | None, seed: int, checkpointing: bool | None,
    max_seq_length: int | None, init: bool | str, loftq_config: Any, task_type: str | None, fields: Mapping[str, Any],
) -> Any:  # fmt: skip
    """The model in PEFT's wrapper; arguments and errors as in FastLanguageModel.get_peft_model."""
    from peft import PeftModel, get_peft_model
    from transformers import set_seed

    state = needed_state(model)
    check_lora(**{name: fields[name] for name in ("r", "lora_alpha", "lora_dropout", "bias")})
    _shorten(state, max_seq_length)
    if checkpointing is not None:
        state.checkpointing = checkpointing
    if state.full_finetuning:
        LOG.warning("get_peft_model changes nothing: the model was loaded with full_finetuning=True")
        return model
    chosen_layers = _layers(model, layers, last_layers)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for argument in ("rank_pattern", "alpha_pattern", "exclude_modules"):
        patterns = fields[argument] or ()
        if isinstance(patterns, str):
            check_modules(base, argument=argument, names=patterns)
        else:
            check_name_patterns(base, argument=argument, patterns=patterns)
    if isinstance(model, PeftModel):
        asked = choose_targets(model.get_base_model(), target_modules=targets, modules_to_save=modules_to_save)
        return keep_adapter(model, chosen=asked, layers=chosen_layers, switches=switches, fields=fields)
    chosen = choose_targets(model, target_modules=targets, modules_to_save=modules_to_save, switches=switches)
    chosen = within_layers(model, chosen, chosen_layers)
    if state.offload_embedding and EMBEDDINGS[0] in chosen.saved:
        check_offload(model.config, trained=f"{EMBEDDINGS[0]} in target_modules or modules_to_save")
    config = lora_config(
        chosen, init_lora_weights=init, loftq_config=loftq_config, task_type=task_type or state.task_type,
        layers_to_transform=chosen_layers, fan_in_fan_out=_is_transposed(model),
        auto_mapping=describe_base(model, vocabulary=state.stored_rows), **fields,
    )  # fmt: skip
    if init == "loftq":
        _check_loftq(model, loftq_config)
    model.requires_grad_(False)
    set_seed(seed)
    try:
        wrapped: Any = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise CommandError(
            "PEFT cannot put this adapter on this model", code="api-lora", where="get_peft_model", why=str(error),
            fix="change the argument it names; PiSSA and OLoRA need weights that are not quantised",
        ) from error  # fmt: skip
    if init == "loftq":
        from dropforge.fast.loftq import start_from_residual

        start_from_residual(wrapped, folder=state.source.path)
    if isinstance(init, str):
        state.initial = initial_pairs(wrapped, init=init.partition("_niter_")[0])
    hold_in_fp32(wrapped)
    if state.source.kind != "folder":
        # PEFT would record where the files lie, which is of no use on another machine.
        wrapped.peft_config["default"].base_model_name_or_path = state.source.id
    return wrapped


def _shorten(state: ModelState, length: int | None) -> None:
    if length is not None and length > state.max_seq_length:
        LOG.warning(
            "max_seq_length=%d has no effect: the model was loaded with max_seq_length=%d", length, state.max_seq_length
        )
    elif length is not None:
        state.max_seq_length = length


def _layers(model: Any, layers: int | Iterable[int] | None, last: int | None) -> list[int] | None:
    if last is not None:
        if layers is not None:
            raise CommandError(
                "layers_to_transform and finetune_last_n_layers both choose layers", code="api-layers",
                where="finetune_last_n_layers", fix="give one of them",
            )  # fmt: skip
        count = model.config.get_text_config().num_hidden_layers
        return check_layers(model.config, layers=range(count - last, count), argument="finetune_last_n_layers")
    return check_layers(model.config, layers=layers, argument="layers_to_transform")


def _is_transposed(model: Any) -> bool:
    """GPT-2's layers keep their weights as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _check_loftq(model: Any, config: Any) -> None:
    if not getattr(model, "is_loaded_in_4bit", False):
        raise CommandError(
            "init_lora_weights='loftq' repairs what 4 bits lost, and this model is not held in 4 bits", code="api-init",
            where="init_lora_weights", fix="load it with load_in_4bit=True, or leave init_lora_weights out",
        )  # fmt: skip
    fields = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    bits = fields.get("loftq_bits", LOFTQ_BITS)
    if bits != LOFTQ_BITS:
        raise CommandError(
            f"loftq_config: loftq_bits cannot be {bits!r}", code="api-init", where="loftq_config",
            fix=f"leave it out: the weights are held in {LOFTQ_BITS} bits",
        )  # fmt: skip
