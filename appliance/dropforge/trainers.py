"""TRL's SFTTrainer and SFTConfig, subclassed thinly: they also take arguments under their older names and places.

A model loaded by FastLanguageModel brings its own row length, and texts that carry the begin and end tokens already do
not get them twice. Everything else is TRL's.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
from typing import Any

import torch
import trl
from transformers import Trainer, TrainingArguments

from dropforge.errors import CommandError
from dropforge.fast_language_model import FastLanguageModel, ModelState, state_of

LOG = logging.getLogger("dropforge")
RENAMED = {"max_seq_length": "max_length", "evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps",
           "no_cuda": "use_cpu", "per_gpu_train_batch_size": "per_device_train_batch_size"}  # fmt: skip
WITHOUT_EFFECT = ("overwrite_output_dir", "save_safetensors")
"""Older arguments whose effect is now always on, or is decided by resume_from_checkpoint."""
MOVED = ("dataset_text_field", "max_seq_length", "packing", "dataset_num_proc", "eval_packing", "dataset_kwargs")
"""Arguments of the config that older scripts give to the trainer."""


class SFTConfig(trl.SFTConfig):
    """trl.SFTConfig that also takes max_seq_length, warmup_ratio, evaluation_strategy and other older names.

    On a machine without a GPU it trains on the CPU in fp32 unless told otherwise. Raises CommandError api-argument for
    a name that neither TRL nor its older releases know, and for one argument under two names with two values.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        translated = _translate(arguments)
        self.length_given = "max_length" in translated
        if not torch.cuda.is_available():
            translated.setdefault("use_cpu", True)
            if not translated.get("fp16"):
                translated.setdefault("bf16", False)
            translated.setdefault("dataloader_pin_memory", False)
        super().__init__(*args, **translated)


def _translate(arguments: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(trl.SFTConfig) if field.init}
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in WITHOUT_EFFECT:
            LOG.info("%s has no effect any more", name)
            continue
        new = name if name in fields else RENAMED.get(name)
        if new is None:
            near = difflib.get_close_matches(name, [*fields, *RENAMED], n=1)
            raise CommandError(
                f"SFTConfig has no argument {name!r}", code="api-argument", where=name,
                fix=f"did you mean {near[0]!r}?" if near else "see TRL's page of SFTConfig",
            )  # fmt: skip
        if new in result and result[new] != value:
            if name == "warmup_ratio" or "warmup_ratio" in arguments:
                # transformers let steps win over the ratio.
                result[new] = arguments["warmup_steps"] or arguments["warmup_ratio"]
                continue
            raise CommandError(
                f"{name} and {new} are the same argument with two values", code="api-argument", where=name,
                fix=f"give only {new}",
            )  # fmt: skip
        result[new] = value
    return result


class SFTTrainer(trl.SFTTrainer):
    """trl.SFTTrainer that also takes tokenizer, dataset_text_field, max_seq_length, packing and dataset_num_proc.

    Raises CommandError api-argument when one argument is given in two places with two values.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        tokenizer: Any = None,
        processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        formatting_func: Any = None,
        **others: Any,
    ) -> None:
        moved = {name: others.pop(name) for name in MOVED if others.get(name) is not None}
        state = state_of(model)
        config = _with_length(_with_moved(_as_config(args), moved), state)
        tokens = processing_class or tokenizer or (state.tokenizer if state else None)
        if state is not None:
            FastLanguageModel.for_training(model)
            # Its layers are recomputed as get_peft_model was told; TRL's default would switch that on again.
            config.gradient_checkpointing = state.checkpointing
            config.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if tokens is not None and formatting_func is None:
            train_dataset = _tokenised(train_dataset, tokens, config)
            eval_dataset = _tokenised(eval_dataset, tokens, config)
        super().__init__(
            model=model, args=config, processing_class=tokens, train_dataset=train_dataset, eval_dataset=eval_dataset,
            formatting_func=formatting_func, **others,
        )  # fmt: skip

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss where this library's fused one is in it, and on a CPU, where TRL's fused head cannot run.

        Evaluation on a GPU takes TRL's, which does not form the logits either.
        """
        if self.args.device.type == "cpu" or (model.training and self._has_our_loss()):
            inputs = {**inputs, "use_cache": False}
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _has_our_loss(self) -> bool:
        state = state_of(self.model)
        session = state.session if state else None
        config: Any = self.args
        if session is None or not session.open or config.loss_type != "nll" or self.label_smoother is not None:
            return False
        return any(swap.patch.endswith(".linear_cross_entropy") for swap in session.report.swaps)


def _as_config(args: TrainingArguments | None) -> trl.SFTConfig:
    if args is None:
        return SFTConfig(output_dir="outputs")
    if isinstance(args, trl.SFTConfig):
        return copy.copy(args)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    return SFTConfig(**given)


def _with_moved(config: trl.SFTConfig, moved: dict[str, Any]) -> trl.SFTConfig:
    defaults = {field.name: field.default for field in dataclasses.fields(trl.SFTConfig)}
    for name, value in moved.items():
        field = RENAMED.get(name, name)
        current = getattr(config, field)
        if current not in (defaults[field], value):
            raise CommandError(
                f"{name}={value!r} of the trainer and {field}={current!r} of its args contradict each other",
                code="api-argument", where=name, fix="give it once, in SFTConfig",
            )  # fmt: skip
        setattr(config, field, value)
        if field == "max_length":
            config.length_given = True  # type: ignore[attr-defined]
    return config


def _with_length(config: trl.SFTConfig, state: ModelState | None) -> trl.SFTConfig:
    """The limit given at loading: used when the trainer has none, and never widened."""
    if state is None:
        return config
    given = getattr(config, "length_given", True)
    if not given or config.max_length is None or config.max_length > state.max_seq_length:
        if given and config.max_length is not None:
            LOG.warning("rows are cut at %d tokens, the max_seq_length given at loading", state.max_seq_length)
        config.max_length = state.max_seq_length
    return config


def _tokenised(dataset: Any, tokenizer: Any, config: trl.SFTConfig) -> Any:
    """A data set of rendered texts as input_ids, with one begin token and one end token each.

    A chat template writes both into the text; a tokenizer that adds the first, and TRL that adds the second, would
    make two. Other data sets (conversations, prompt and completion, tokenised, streamed) are left to TRL.
    """
    field = config.dataset_text_field
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or field not in columns or "input_ids" in columns:
        return dataset

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": encode_text(row[field], tokenizer)}

    return dataset.map(encode, remove_columns=columns, num_proc=config.dataset_num_proc, desc="tokens")


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of one training text, with neither a second begin token nor a second end token."""
    ids: list[int] = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if eos is not None and tokenizer.eos_token and not text.rstrip().endswith(tokenizer.eos_token):
        ids = [*ids, eos]
    return ids
