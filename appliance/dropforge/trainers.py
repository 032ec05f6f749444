"""Trainers and configs of TRL and transformers, subclassed thinly: older names and places of arguments work too.

A model loaded by FastLanguageModel brings its own row length and precision, and texts that carry the begin and end
tokens already do not get them twice. A checkpoint remembers its run, and no other run goes on from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
import trl
from peft import PeftModel
from transformers import TrainingArguments as PlainTrainingArguments

from dropforge.fast.modes import to_training
from dropforge.fast.repairs import warn_of_untrained
from dropforge.fast.state import state_of
from dropforge.fast_step.trainer import FastOptions, FastStepMixin
from dropforge.parameter_groups import EmbeddingRateMixin
from dropforge.plain_head import add_plain_head
from dropforge.trainer_arguments import OlderNames, as_config, fit_to_model, split_moved, with_moved
from dropforge.trainer_checks import check_rows, check_trainable
from dropforge.trainer_fast import fast_options, own_parts
from dropforge.trainer_records import check_same_run, find_checkpoint, write_record
from dropforge.trainer_texts import can_format, encode_text, formatted, prepared

if TYPE_CHECKING:
    from dropforge.trainers_preference import CPOConfig as CPOConfig
    from dropforge.trainers_preference import CPOTrainer as CPOTrainer
    from dropforge.trainers_preference import DPOConfig as DPOConfig
    from dropforge.trainers_preference import DPOTrainer as DPOTrainer
    from dropforge.trainers_preference import KTOConfig as KTOConfig
    from dropforge.trainers_preference import KTOTrainer as KTOTrainer
    from dropforge.trainers_preference import ORPOConfig as ORPOConfig
    from dropforge.trainers_preference import ORPOTrainer as ORPOTrainer

__all__ = ["DropforgeTrainer", "DropforgeTrainingArguments", "SFTConfig", "SFTTrainer", "Trainer",
           "TrainingArguments", "FastOptions", "encode_text"]  # fmt: skip
_PREFERENCE = ("DPO", "KTO", "ORPO", "CPO")


class TrainingArguments(OlderNames, PlainTrainingArguments):
    """transformers.TrainingArguments that also takes older names, and embedding_learning_rate. See OlderNames."""


class SFTConfig(OlderNames, trl.SFTConfig):
    """trl.SFTConfig that also takes max_seq_length, warmup_ratio and other older names, and embedding_learning_rate.

    embedding_learning_rate: rate of embed_tokens and lm_head when they are trained, usually 2 to 10 times smaller than
    learning_rate; None: they learn like the rest. See OlderNames.
    """


class DropforgeTrainingArguments(SFTConfig):
    """SFTConfig under the name that continued-pretraining scripts use."""


class RunRecord:
    """Mixin before a trainer: checkpoints carry a record of their run, and resuming compares it first."""

    args: Any

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As the trainer's own. Raises CommandError: api-no-checkpoint, api-other-run, before anything is loaded."""
        folder = find_checkpoint(resume_from_checkpoint, output_dir=self.args.output_dir)
        if folder is not None:
            check_same_run(folder, self)
        return super().train(  # type: ignore[misc]
            resume_from_checkpoint=str(folder) if folder else None, trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
        )  # fmt: skip

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer: Any = self
        if trainer.is_world_process_zero():
            name = f"checkpoint-{trainer.state.global_step}"
            write_record(trainer, Path(trainer._get_output_dir(trial=trial)) / name)


class Trainer(RunRecord, EmbeddingRateMixin, transformers.Trainer):
    """transformers.Trainer that also takes `tokenizer`, and knows the models of this library."""

    def __init__(self, model: Any = None, args: Any = None, *, tokenizer: Any = None, **others: Any) -> None:
        others.setdefault("processing_class", tokenizer)
        state = state_of(model)
        check_trainable(model, state)
        if state is not None:
            to_training(model)
        super().__init__(model=model, args=fit_to_model(as_config(args, TrainingArguments), state), **others)


class SFTTrainer(RunRecord, FastStepMixin, EmbeddingRateMixin, trl.SFTTrainer):
    """trl.SFTTrainer that also takes tokenizer, dataset_text_field, max_seq_length, packing and such.

    fast: on a GPU, a model that this library loaded trains with the fast step (dropforge.fast_step): documents packed
    without touching each other, steps captured as CUDA graphs, the optimizer over flat buffers; `report` says what it
    did. False leaves TRL's own step, FastOptions sets its details.

    Raises CommandError api-argument for an argument nobody knows, or given in two places with two values;
    api-precision, api-embedding-rate, and when training goes on: api-no-checkpoint, api-other-run.
    """

    def __init__(
        self,
        model: Any,
        args: PlainTrainingArguments | None = None,
        *,
        tokenizer: Any = None,
        processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        formatting_func: Any = None,
        fast: FastOptions | bool = True,
        **others: Any,
    ) -> None:
        stay, moved = split_moved(trl.SFTTrainer, trl.SFTConfig, others)
        state = state_of(model)
        config = fit_to_model(with_moved(as_config(args, SFTConfig), moved), state)
        tokens = processing_class or tokenizer or (state.tokenizer if state else None)
        check_trainable(model, state)
        if state is not None:
            to_training(model)
        if formatting_func is not None and can_format(train_dataset):
            train_dataset = formatted(train_dataset, formatting_func, config)
            eval_dataset = formatted(eval_dataset, formatting_func, config)
            formatting_func = None
        if formatting_func is None:
            check_rows(train_dataset, config, argument="train_dataset")
            check_rows(eval_dataset, config, argument="eval_dataset")
        if tokens is not None and formatting_func is None:
            train_dataset = prepared(train_dataset, tokens, config)
            eval_dataset = prepared(eval_dataset, tokens, config)
            config.assistant_only_loss = config.assistant_only_loss and not _has_labels(train_dataset)
        trained = _trained_values(model)
        own = own_parts(type(self), DropforgeTrainer if isinstance(self, DropforgeTrainer) else SFTTrainer, stay)
        options = fast_options(fast, config=config, model=model, dataset=train_dataset, state=state, own=own)
        super().__init__(
            model=model, args=config, processing_class=tokens, train_dataset=train_dataset, eval_dataset=eval_dataset,
            formatting_func=formatting_func, fast=options, kernels=state.session if state else None, **stay,
        )  # fmt: skip
        # TRL rounds what is trained beside quantised weights to bf16, which loses small updates.
        for name, parameter in self.model.named_parameters():
            if name in trained:
                parameter.data = trained[name]
        if self.args.device.type == "cpu" and config.loss_type != "nll":
            made: Any = self.model
            add_plain_head(made.get_base_model() if isinstance(made, PeftModel) else made)
        if state is not None:
            warn_of_untrained(self.train_dataset, model, state)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss where this library's fused one is in it, and on a CPU, where TRL's fused head cannot run.

        Evaluation on a GPU takes TRL's, which does not form the logits either.
        """
        config: Any = self.args
        plain = config.device.type == "cpu" and config.loss_type == "nll"
        if plain or (model.training and self._has_our_loss()):
            inputs = {**inputs, "use_cache": False}
            return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _has_our_loss(self) -> bool:
        state = state_of(self.model)
        session = state.session if state else None
        config: Any = self.args
        if session is None or not session.open or config.loss_type != "nll" or self.label_smoother is not None:
            return False
        return any(swap.patch.endswith(".linear_cross_entropy") for swap in session.report.swaps)


class DropforgeTrainer(SFTTrainer):
    """SFTTrainer under the name that continued-pretraining scripts use; see embedding_learning_rate of SFTConfig."""


def _has_labels(dataset: Any) -> bool:
    return "labels" in (getattr(dataset, "column_names", None) or ())


def _trained_values(model: Any) -> dict[str, Any]:
    if isinstance(model, str):
        return {}
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def __getattr__(name: str) -> Any:
    """The preference trainers, imported when they are first used: some are experimental in TRL, and say so loudly."""
    if name.endswith(("Trainer", "Config")) and not name.startswith(_PREFERENCE) and name in dir(trl):
        raise ImportError(
            f"dropforge.trainers has no {name} in this release; TRL's own (from trl import {name}) trains such a model "
            "with TRL's step, and is not tested with models loaded by this library"
        )
    if not name.startswith(_PREFERENCE):
        raise AttributeError(f"module 'dropforge.trainers' has no attribute {name!r}")
    from dropforge import trainers_preference

    return getattr(trainers_preference, name)
