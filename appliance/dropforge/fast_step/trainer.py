"""A mixin that puts the fast step into transformers' Trainer (5.17) and TRL's SFTTrainer (1.15).

    class Mine(FastStepMixin, SFTTrainer): ...
    Mine(..., fast=FastOptions(packing="auto"))

One item of its data loader is one optimizer step, so the trainer's own gradient accumulation becomes 1 and
``per_device_train_batch_size`` the documents of a step; both are set on a copy of the arguments. Callbacks, schedules,
evaluation, checkpoints and resuming stay the trainer's. Loss and gradient norm are logged with their own step's number,
a step or two after it. What stands in the way (``obstacles``) leaves the trainer as it is; ``report`` says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from dropforge_kernels.patch.attention_interface import packed_attention
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dropforge.fast_step.compiled import LayerCompiler
from dropforge.fast_step.graph import GraphPool
from dropforge.fast_step.isolation import packing_obstacle
from dropforge.fast_step.kernels import graph_line, plan_layers, smaller_plan
from dropforge.fast_step.late_log import LateLog
from dropforge.fast_step.loader import step_loader
from dropforge.fast_step.meter import StepMeter
from dropforge.fast_step.obstacles import capture_obstacle, fast_obstacle
from dropforge.fast_step.optimizer import FlatAdamW
from dropforge.fast_step.optimizer_choice import EIGHT_BIT, flat_optimizer
from dropforge.fast_step.options import FastOptions, for_whole_steps
from dropforge.fast_step.order import check_order, order_of, write_order
from dropforge.fast_step.report import FastReport
from dropforge.fast_step.step import BucketStep
from dropforge.packing.choose import choose_packing
from dropforge.packing.collate import StepBatch
from dropforge.packing.feed import Feeder
from dropforge.packing.rows import token_rows

if TYPE_CHECKING:
    from dropforge_kernels.modules.memory_plan import MemoryPlan
    from dropforge_kernels.patch.session import Session
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object


class FastStepMixin(_Base):
    """See the top of this file. ``fast=None`` changes nothing. kernels: the open session, whose engine is planned."""

    def __init__(
        self, *args: Any, fast: FastOptions | None = None, kernels: Session | None = None, **kwargs: Any
    ) -> None:
        self.fast = fast
        self._kernels = kernels
        self.report = FastReport()
        self._feeder: Feeder | None = None
        self._step: BucketStep | None = None
        self._late = LateLog()
        self._memory: MemoryPlan | None = None
        self._flos_per_token = 0
        training: Any = kwargs.get("args")
        if fast is not None and training is not None:
            why_not = fast_obstacle(training, kwargs["model"], kwargs.get("train_dataset"))
            why_not = why_not or packing_obstacle(kwargs["model"])
            if why_not:
                self.fast = None
                self.report.notes.append(f"plain training step: {why_not}")
            else:
                self._documents = training.per_device_train_batch_size * training.gradient_accumulation_steps
                self._per_micro = training.per_device_train_batch_size
                kwargs["args"] = for_whole_steps(training, self._documents)
        super().__init__(*args, **kwargs)

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Optimizer steps instead of batches."""
        if self.fast is None:
            return super().get_train_dataloader()
        rows = token_rows(self.train_dataset)  # type: ignore[arg-type]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        choice = choose_packing(
            rows, asked=self.fast.packing, documents_per_step=self._documents, per_micro=self._per_micro,
            budget=self.fast.budget, rows_per_step=self.fast.rows_per_step, seed=seed,
        )  # fmt: skip
        self.report.packing = choice.reason
        pad = getattr(self.processing_class, "pad_token_id", None) or 0
        self._feeder = Feeder(rows, choice.plan, pad=pad, pin=self.args.device.type == "cuda")
        return step_loader(self._feeder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._feeder is not None:
            self._feeder.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The next step; its targets are counted already."""
        if self.fast is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        assert self._meter is not None
        with self._meter.waiting(data=True):
            batch = next(epoch_iterator, None)
        return ([] if batch is None else [batch]), None

    # --- step -----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over flat buffers; for other optimizers the trainer's own, with flat gradients."""
        if self.fast is None or self.optimizer is not None:
            return super().create_optimizer(model)
        self._plan_memory()
        trained: Any = self.model if model is None else model
        self._flat, self.optimizer, self.report.optimizer = flat_optimizer(self, trained)
        if self.optimizer is None:
            super().create_optimizer(model)
        return self.optimizer  # type: ignore[return-value]

    def _plan_memory(self) -> None:
        if self._kernels is None or self.args.device.type != "cuda" or self._feeder is None:
            return
        plan, name = self._feeder.plan, str(getattr(self.args.optim, "value", self.args.optim))
        made = plan_layers(
            self._kernels, self.model, tokens=plan.buckets.budget, document=int(plan.lengths.mean()),  # type: ignore[arg-type]
            optimizer="adamw_8bit" if name in EIGHT_BIT else name,
        )  # fmt: skip
        if made is not None:
            self._memory = made
            self.report.notes += made.lines()
            self.report.planned_memory = made.predicted_peak
            if self.fast is not None and self.fast.capture:
                self.report.planned_graphs = made.predicted.activations
                self.report.notes.append(graph_line(made))

    def _retreat(self) -> str:
        """A plan that needs less memory, in the engine; empty when there is none."""
        if self._memory is None or self._kernels is None:
            return ""
        smaller = smaller_plan(self._kernels, self._memory)
        if smaller is None:
            return ""
        self._memory, self.report.planned_memory = smaller, smaller.predicted_peak
        return "\n".join(smaller.lines())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of all micro-batches of an optimizer step; returns its loss, on the device."""
        if not isinstance(inputs, StepBatch):
            return super().training_step(model, inputs, num_items_in_batch)
        assert self._step is not None and self._meter is not None
        if not model.training:
            model.train()
        self._step.begin()
        for micro in inputs.micro:
            self._meter.micro_batch()
            self._step.run(micro)
        self._meter.step(inputs, changes=self._step.changes)
        return self._step.loss

    def _clip_grad_norm(self, model: Any) -> Any:
        if isinstance(self._flat_optimizer(), FlatAdamW):
            return self._flat_optimizer().last_norm  # type: ignore[union-attr]  # filled by the step that follows
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        optimizer = self._flat_optimizer()
        return optimizer.last_norm if optimizer is not None else super()._get_grad_norm(model, grad_norm=grad_norm)

    def _flat_optimizer(self) -> FlatAdamW | None:
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return inner if isinstance(inner, FlatAdamW) else None

    def floating_point_ops(self, inputs: Any) -> int:
        """The trainer's formula, with the parameters counted once."""
        if not isinstance(inputs, StepBatch):
            return super().floating_point_ops(inputs)
        if not self._flos_per_token:
            self._flos_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)  # type: ignore[union-attr, operator]
        return self._flos_per_token * inputs.tokens

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if not isinstance(inputs, StepBatch):
            super()._track_num_input_tokens(inputs)
        elif self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += inputs.tokens

    # --- the loop around it ---------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.fast is None:
            return super()._inner_training_loop(*args, **kwargs)
        with self._fast_session():
            return super()._inner_training_loop(*args, **kwargs)

    @contextmanager
    def _fast_session(self) -> Iterator[None]:
        """The model attends to packed rows and keeps its gradient views; all of it is put back."""
        model: Any = self.model
        device = self.args.device
        with ExitStack() as stack:
            stack.enter_context(packed_attention(model))
            self._meter = StepMeter(self.report, device=device)
            self._late = LateLog()  # a training that was broken off may have left some
            model.zero_grad = self._zero_grad
            stack.callback(model.__dict__.pop, "zero_grad", None)
            stack.callback(self._end_session)
            yield

    def _end_session(self) -> None:
        self._meter.update()
        optimizer = self._flat_optimizer()
        if optimizer is not None and optimizer.why_not_captured:
            self.report.note(f"optimizer step not captured: {optimizer.why_not_captured}")
        if self._feeder is not None:
            self._feeder.close()
        if self._step is not None and self._step.layers is not None:
            self._step.layers.switch(False)
        self._step = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if self.fast is not None:
            assert self._feeder is not None
            checkpoint = kwargs.get("resume_from_checkpoint", args[2] if len(args) > 2 else None)
            if checkpoint is not None:
                check_order(Path(checkpoint), order_of(self._feeder))
            why_not = "switched off" if not self.fast.capture else capture_obstacle(self.args, model)
            self._flat.attach_grads()
            self._step = BucketStep(
                self._loss_of(model), grads=self._flat.grads.values(), device=self.args.device, report=self.report,
                split=self._feeder.split, retreat=self._retreat, capture=not why_not, why_not=why_not,
                layers=self._layer_compiler(model),
            )  # fmt: skip
            optimizer = self._flat_optimizer()
            if optimizer is not None and self._step.pool is not None:
                # A pool of its own: the buckets' must be free to go when their graphs do.
                optimizer.capture_with(GraphPool(self._step.device).record)
        return model, loader

    def _layer_compiler(self, model: Any) -> LayerCompiler | None:
        assert self.fast is not None
        asked = self.fast.compile
        if asked is False or (asked is None and self.args.device.type != "cuda"):
            return None
        written = self._kernels is not None and self._kernels.engine is not None
        return LayerCompiler(model, why_not="the layers are hand-written" if written else "")

    def _loss_of(self, model: Any) -> Any:
        def loss_of(inputs: dict[str, Any]) -> torch.Tensor:
            loss: torch.Tensor = model(**inputs).loss
            return loss

        return loss_of

    def _zero_grad(self, set_to_none: bool = True) -> None:
        self._flat.zero_grad()

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, trial: Any, epoch: float, ignore_keys_for_eval: Any,
        start_time: float, learning_rate: float | None = None,
    ) -> None:  # fmt: skip
        if self.fast is None:
            super()._maybe_log_save_evaluate(
                tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
            )
            return
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0:
            norm = grad_norm if isinstance(grad_norm, torch.Tensor) else torch.tensor(float(grad_norm or 0.0))
            self._late.put(
                tr_loss, norm.to(tr_loss.device), step=self.state.global_step, epoch=self.state.epoch or 0.0,
                steps=steps, learning_rate=self._get_learning_rate() if learning_rate is None else learning_rate,
            )  # fmt: skip
            tr_loss.zero_()
            self._globalstep_last_logged = self.state.global_step
            self.control.should_log = False
        pause = self.control.should_evaluate or self.control.should_save or self.control.should_training_stop
        self._log_arrived(start_time, wait=pause)
        if pause:
            super()._maybe_log_save_evaluate(
                tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
            )
            self._meter.pause()

    def _log_arrived(self, start_time: float | None, *, wait: bool) -> None:
        with self._meter.waiting():
            arrived = list(self._late.take(wait=wait))
        for row in arrived:
            self._meter.update()
            loss, norm = row.values.tolist()
            self._total_loss_scalar += loss
            logs = {"loss": loss / row.steps, "grad_norm": norm, "learning_rate": row.learning_rate}
            now = self.state.global_step, self.state.epoch
            self.state.global_step, self.state.epoch = row.step, row.epoch
            try:
                self.log({**logs, "tokens_per_second": self.report.steady_tokens_per_second}, start_time)
            finally:
                self.state.global_step, self.state.epoch = now

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._feeder is not None:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_order(Path(self._get_output_dir(trial)) / folder, order_of(self._feeder))

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        if self.fast is not None:
            self._log_arrived(start_time, wait=True)
        return super()._finalize_training(trial, num_train_samples, start_time)
