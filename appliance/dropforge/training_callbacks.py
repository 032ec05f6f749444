"""What happens between optimizer steps: progress, metrics, saving by wall time, stopping, NaN, early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dropforge.errors import Reason, TrainingError
from dropforge.events import RunLog
from dropforge.fast_step.report import FastReport
from dropforge.spec import EarlyStopping, TrainSpec
from dropforge.stop import StopSignal


class JobCallback(TrainerCallback):
    """Between the trainer and the run folder.

    Args:
        log: where progress, metrics and events go.
        stop: polled after every step.
        train: the resolved train section; save_minutes and save_steps decide when to save.
        trained_tokens: tokens per epoch that count in the loss, for the rate.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        log: RunLog,
        stop: StopSignal,
        train: TrainSpec,
        trained_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log = log
        self.stop = stop
        self.train = train
        self.trained_tokens = trained_tokens
        self.clock = clock
        self.speed: FastReport | None = None
        """Rates of the fast step, for status and metrics; None, or without numbers, where it does not run."""
        self.stopped_for: Reason | None = None
        self._last_save = self._start_time = 0.0
        self._start_step, self._start_epoch = 0, 0.0
        self._eval_batches = 0
        self._told: set[str] = set()

    def tell_engine(self) -> None:
        """What the fast step has done since the last time, as events: which buckets are captured, what does not fit."""
        for line in self.speed.lines() if self.speed is not None else ():
            if line not in self._told:
                self._told.add(line)
                self.log.event("engine", text=line)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_save = self._start_time = self.clock()
        self._start_step, self._start_epoch = state.global_step, state.epoch or 0.0
        self.log.progress(step=state.global_step, total_steps=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.log.progress(step=state.global_step, total_steps=state.max_steps, epoch=round(state.epoch or 0.0, 4))
        due = self.clock() - self._last_save >= self.train.save_minutes * 60
        every = self.train.save_steps
        if self.stop.requested:
            self.stopped_for = self.stop.reason
            control.should_training_stop = True
            control.should_save = self.stop.save
        elif due or (every and state.global_step % every == 0) or self.stop.take_checkpoint_request():
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_save = self.clock()
        self.log.event("checkpoint", step=state.global_step)
        self.log.progress(checkpoint_step=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tell_engine()
        values = logs or {}
        loss, norm = values.get("loss"), values.get("grad_norm", 0.0)
        if loss is None:
            return
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss became {loss} (gradient norm {norm}) at step {state.global_step}",
                code="train-nan",
                reason=Reason.NAN_LOSS,
                why="the weights diverged or the data holds broken rows",
                fix="lower train.learning_rate, or look at the rows around this step; the last checkpoint is kept",
            )
        seconds = max(self.clock() - self._start_time, 1e-9)
        epochs = (state.epoch or 0.0) - self._start_epoch
        steps = max(state.global_step - self._start_step, 1)
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "loss": loss,
            "learning_rate": values.get("learning_rate"),
            "grad_norm": norm,
            "trained_tokens_per_second": round(epochs * self.trained_tokens / seconds, 1),
        }
        if self.speed is not None and self.speed.tokens_per_second:
            row["tokens_per_second"] = self.speed.steady_tokens_per_second
            row["host_ms_per_micro_batch"] = self.speed.host_ms_per_micro_batch
        self.log.metrics(**row)
        self.log.progress(**row, eta_seconds=round((state.max_steps - state.global_step) * seconds / steps))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation may last longer than many steps: each of its batches shows that the job lives."""
        self._eval_batches += 1
        self.log.progress(eval_batches=self._eval_batches)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is not None:
            self.log.metrics(step=state.global_step, eval_loss=loss)
            self.log.progress(eval_loss=loss)


class EarlyStopCallback(TrainerCallback):
    """Stop after `rule.patience` evaluations without improvement, and keep the best weights.

    All its state is in the trainer's log history and in one file of best weights, so a resumed run decides alike.

    Args:
        rule: None switches it off.
        best: where the trained parameters of the best evaluation are kept.
        log: gets one event when it stops the training.
    """

    def __init__(self, rule: EarlyStopping | None, best: Path, log: RunLog) -> None:
        self.rule = rule
        self.best = best
        self.log = log

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.rule is None:
            return
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        best_loss, best_at = math.inf, -1
        for at, loss in enumerate(losses):
            if loss < best_loss - self.rule.threshold:
                best_loss, best_at = loss, at
        if best_at == len(losses) - 1:
            self._keep(kwargs["model"])
        elif len(losses) - 1 - best_at >= self.rule.patience:
            self.log.event("early_stop", step=state.global_step, best_eval_loss=best_loss)
            control.should_training_stop = True

    def _keep(self, model: torch.nn.Module) -> None:
        temporary = self.best.with_suffix(".tmp")
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, temporary)
        temporary.rename(self.best)

    def restore_best(self, model: torch.nn.Module) -> None:
        """Put the weights of the best evaluation back, when early stopping kept some."""
        if self.rule is None or not self.best.exists():
            return
        kept = load_file(self.best)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
