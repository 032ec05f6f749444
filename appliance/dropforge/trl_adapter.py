"""The one file that knows TRL and transformers' Trainer: our arguments in, their classes out.

Version-bound facts live here (TRL 1.15, transformers 5.17) and in training_callbacks.py: how a checkpoint is written,
which arguments mean what.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer

from dropforge.checkpoints import CheckpointStore
from dropforge.errors import JobStopped, Reason, TrainingError
from dropforge.events import RunLog
from dropforge.fast_step.obstacles import has_dropout
from dropforge.fast_step.trainer import FastOptions, FastStepMixin
from dropforge.parameter_groups import EmbeddingRateMixin
from dropforge.plan import Plan
from dropforge.spec import TrainSpec
from dropforge.stop import StopSignal
from dropforge.training_callbacks import EarlyStopCallback, JobCallback

if TYPE_CHECKING:
    from datasets import Dataset
    from dropforge_kernels.patch.session import Session
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sft_config(train: TrainSpec, plan: Plan, *, output: Path, has_eval: bool, dropout: bool) -> SFTConfig:
    """Our resolved train section as TRL's arguments. The data set comes tokenised and labelled, so none prepares it.

    dropout: the model has some.
    """
    return SFTConfig(
        output_dir=str(output),
        num_train_epochs=train.num_train_epochs or 1.0,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate or 0.0,
        per_device_train_batch_size=plan.per_device_train_batch_size,
        per_device_eval_batch_size=plan.per_device_train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        lr_scheduler_type=train.lr_scheduler_type,
        # transformers 5 reads a value below 1 as a ratio of all steps.
        warmup_steps=train.warmup_steps if train.warmup_steps is not None else train.warmup_ratio or 0.0,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=plan.optim,
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        eval_strategy="no" if not has_eval else ("steps" if train.eval_steps else "epoch"),
        eval_steps=train.eval_steps,
        save_strategy="no",  # JobCallback decides, by wall time
        neftune_noise_alpha=train.neftune_noise_alpha,
        max_length=None,  # rows are truncated and counted by dropforge.data
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        bf16=plan.compute_dtype == "bfloat16",
        use_cpu=plan.device == "cpu",
        gradient_checkpointing=plan.gradient_checkpointing,
        # Without dropout nothing random is computed again, and asking for the random state would forbid CUDA graphs.
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": dropout},
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=plan.device != "cpu",
    )


class JobSFTTrainer(FastStepMixin, EmbeddingRateMixin, SFTTrainer):
    """TRL's SFTTrainer whose checkpoints go through a CheckpointStore."""

    def __init__(self, *args: Any, store: CheckpointStore, **kwargs: Any) -> None:
        model = kwargs["model"]
        trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(*args, **kwargs)
        self._store = store
        # TRL rounds what is trained beside quantised weights to bf16, which loses small updates, and a resumed run
        # would go on in fp32: not the same run. Keep fp32.
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.data = trained[name]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's fused language-model head is a Triton kernel; on a CPU the model's own loss takes its place."""
        if self.args.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Each checkpoint would get a README; the result folder has the one model card."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._store.clean()
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        self._store.commit(self._store.partial / f"checkpoint-{step}", step)


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What a finished training reports."""

    steps: int
    epochs: float
    train_loss: float
    eval_loss: float | None
    seconds: float
    resumed_from_step: int | None
    engine: dict[str, Any] | None = None
    """What the fast step did (fast_step.report), with the kernels' report; None on a CPU."""


def train_sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, train: TrainSpec, plan: Plan, dataset: Dataset,
    eval_dataset: Dataset | None, trained_tokens: int, store: CheckpointStore, log: RunLog, stop: StopSignal,
    packing: str | bool = "auto", kernels: Session | None = None,
) -> TrainingSummary:  # fmt: skip
    """Run supervised fine-tuning to its end, from the newest good checkpoint of `store` when there is one.

    packing: of the spec's data section; only a GPU packs. kernels: the session that swapped the model's operations.

    Raises:
        TrainingError: NaN loss, out of memory, a checkpoint of another packing order.
        JobStopped: a stop was asked for; the checkpoint was written first unless the request said not to.
    """
    store.clean()
    checkpoint, passed_over = store.newest_good()
    for text in passed_over:
        log.event("checkpoint_skipped", why=text)
    callback = JobCallback(log=log, stop=stop, train=train, trained_tokens=trained_tokens)
    early = EarlyStopCallback(train.early_stopping, store.folder / "best.safetensors", log)
    config: Any = sft_config(
        train, plan, output=store.partial, has_eval=eval_dataset is not None, dropout=has_dropout(model)
    )
    config.embedding_learning_rate = train.embedding_learning_rate
    trainer = JobSFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[callback, early],
        store=store,
        fast=FastOptions(packing=packing, budget=plan.token_budget) if plan.token_budget else None,
        kernels=kernels,
    )
    callback.speed = trainer.report
    trainer.remove_callback(PrinterCallback)  # it prints every metric; metrics.jsonl has them
    if checkpoint:
        log.event("resume", step=checkpoint.step)
    try:
        output = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory(error, plan) from error
    if callback.stopped_for:
        raise JobStopped(
            f"stopped at step {trainer.state.global_step}", code="job-stopped", reason=callback.stopped_for
        )
    early.restore_best(model)
    engine = None
    if plan.token_budget:
        callback.tell_engine()
        engine = trainer.report.as_dict() | {"kernels": kernels.report.lines() if kernels else []}
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return TrainingSummary(
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        train_loss=output.training_loss,
        eval_loss=evaluations[-1] if evaluations else None,
        seconds=round(output.metrics["train_runtime"], 2),
        resumed_from_step=checkpoint.step if checkpoint else None,
        engine=engine,
    )


def _out_of_memory(error: Exception, plan: Plan) -> TrainingError:
    return TrainingError(
        "the GPU ran out of memory",
        code="train-oom",
        reason=Reason.OOM_GPU,
        why=str(error).split("\n")[0],
        fix=f"lower per_device_train_batch_size (now {plan.per_device_train_batch_size}) or model.max_seq_length "
        f"(now {plan.max_seq_length}), or set model.quantization: nf4",
    )
