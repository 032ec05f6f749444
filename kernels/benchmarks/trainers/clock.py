"""Reads the time and the memory of a trainer at the ends of its warm-up and of the measured steps."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmarks._kernel_kinds import Kernel, kernels_of
from transformers import TrainerCallback

COLD = 200
PROFILED = 3


class Clock(TrainerCallback):
    """Stops the training when enough steps are measured.

    Args:
        began: of the trainer's creation, by time.perf_counter.
        warm, steps: optimizer steps before the measurement, and in it.
        seconds: stop measuring after so long, from 10 steps on.
        profile: afterwards PROFILED more steps under the profiler: the time in which kernels run (gpu_ms) and which
            they are (kernels), per step.
        counted: [real tokens so far].
    """

    def __init__(
        self, *, began: float, warm: int, steps: int, seconds: float, profile: bool, counted: list[int]
    ) -> None:
        self.began, self.warm, self.steps, self.seconds = began, warm, steps, seconds
        self.counted = counted
        self.cuda = torch.cuda.is_available()
        self.profile = profile and self.cuda
        self.first = self.start = self.end = 0.0
        self.tokens_start = self.tokens_end = self.measured = self.allocated = self.reserved = 0
        self.cold: float | None = None
        self.gpu_ms: float | None = None
        self.kernels: list[Kernel] = []
        self._profiler: Any = None
        self._until = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """After every optimizer step."""
        step = state.global_step
        if step == 1:
            self.first = self._now()
        if step == self.warm:
            self.start, self.tokens_start = self._now(), self.counted[0]
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
        if step == COLD:
            self.cold = self._now() - self.began
        done = step - self.warm
        late = done >= 10 and time.perf_counter() - self.start > self.seconds
        if not self.end and (done == self.steps or late):
            self._finish(step, done)
            control.should_training_stop = not self.profile
        elif self._profiler is not None and step == self._until:
            self._now()
            self._profiler.stop()
            self.kernels, self.gpu_ms = kernels_of(self._profiler.events(), per=PROFILED)
            control.should_training_stop = True

    def cold_200(self, step_seconds: float) -> float:
        """Wall time of the first COLD steps: measured, or the rest of them at this rate."""
        if self.cold is not None:
            return self.cold
        return self.end - self.began + (COLD - self.warm - self.measured) * step_seconds

    def _finish(self, step: int, done: int) -> None:
        self.end, self.tokens_end, self.measured = self._now(), self.counted[0], done
        if self.cuda:
            self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        if self.profile:
            self._until = step + PROFILED
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
