"""Where a training's time goes: tokens per second, and the host's own time per micro-batch.

Tokens per second are taken between the ends of steps on the device. The host runs ahead of it, so the time between two
calls says nothing about either: after every wait the next steps are queued at once.

The host's time cannot be taken while the launch queue is full, because a launch then waits inside the driver. So single
steps are measured that find it empty: before each of their micro-batches, and after the step before, the device is
waited for, and the waits are taken off.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dropforge.fast_step.report import FastReport
from dropforge.packing.collate import StepBatch

IN_FLIGHT = 2
"""Optimizer steps the host may run ahead of the GPU: enough that it never waits, few enough that stopping is prompt."""

SAMPLED = 32
"""The GPU idles for one step's host time in so many steps."""
SAMPLED_EARLY = (4, 8, 16)
"""And after these, so that a short training has a figure too."""

Mark = float | torch.cuda.Event
"""The end of a step: by the clock, or on the device."""


@dataclass(frozen=True)
class _Queued:
    """A step whose end has not been read yet."""

    end: Mark
    batch: StepBatch
    begins: bool
    """No step came before it, or something else came between."""
    settled: bool
    starved: float


class StepMeter:
    """Counts steps and the time in which the host worked, waited for the GPU, or waited for data.

    Args:
        report: gets the rates at every ``update``.
        device: of the training.
        clock: seconds.
        mark: the end of what has been queued so far; None: a CUDA event on a GPU, else the clock.
    """

    def __init__(
        self,
        report: FastReport,
        *,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        mark: Callable[[], Mark] | None = None,
    ) -> None:
        self.report, self.device, self.clock = report, device, clock
        self._cuda = device.type == "cuda"
        self._mark = mark or (_event if self._cuda else clock)
        self._queue: deque[_Queued] = deque()
        self._before: Mark | None = None
        self._all, self._steady, self._host = _Sums(), _Sums(), _Host()
        self._waited = self._starved = 0.0
        self._began = self.clock()
        self._last: float | None = None
        self._changes = 0
        self._steps = 0
        self._due = self._empty_queue = False

    @contextmanager
    def waiting(self, *, data: bool = False) -> Iterator[None]:
        """The block waits for the GPU, or for data."""
        started = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - started
            if data:
                self._starved += seconds
            else:
                self._waited += seconds

    def pause(self) -> None:
        """What comes now (evaluation, a checkpoint) belongs to no step."""
        self._last, self._empty_queue = None, False

    def micro_batch(self) -> None:
        """A micro-batch is about to be queued."""
        if self._empty_queue and self._cuda:
            with self.waiting():
                torch.cuda.synchronize(self.device)

    def step(self, batch: StepBatch, *, changes: int) -> None:
        """A step has been queued. changes: first runs and captures so far; steps with one are not steady."""
        settled = changes == self._changes
        self._queue.append(_Queued(self._mark(), batch, self._last is None, settled, self._starved))
        if len(self._queue) > IN_FLIGHT:
            self._finish(self._queue.popleft())
        now = self.clock()
        if self._last is None:
            self.report.first_step_seconds = self.report.first_step_seconds or round(now - self._began, 2)
        elif settled and (self._empty_queue or not self._cuda):
            self._host.add(now - self._last - self._waited - self._starved, len(batch.micro))
            self._due = False
        self._changes = changes
        self._last, self._waited, self._starved = now, 0.0, 0.0
        self._steps += 1
        self._due = self._due or self._steps % SAMPLED == 0 or self._steps in SAMPLED_EARLY
        self._empty_queue = self._due  # until a step is measured that met no new shape
        if self._empty_queue and self._cuda:
            with self.waiting():
                torch.cuda.synchronize(self.device)

    def update(self) -> None:
        """Write the rates of the steps that have ended into the report; waits for nothing."""
        while self._queue and _ended(self._queue[0].end):
            self._finish(self._queue.popleft())
        steady = self._steady if self._steady.steps else self._all
        self.report.tokens_per_second = round(self._all.rate(), 1)
        self.report.steady_tokens_per_second = round(steady.rate(), 1)
        self.report.host_ms_per_micro_batch = round(self._host.milliseconds(), 3)
        self.report.wait_for_data_ms_per_step = round(1e3 * steady.starved / max(1, steady.steps), 3)
        self.report.filled = round(self._all.tokens / max(1, self._all.computed), 4)
        if self._cuda:
            self.report.peak_memory = torch.cuda.max_memory_allocated(self.device)
            self.report.peak_reserved = torch.cuda.max_memory_reserved(self.device)

    def _finish(self, step: _Queued) -> None:
        """Waits for the step's end and counts it."""
        if isinstance(step.end, torch.cuda.Event):
            with self.waiting():
                step.end.synchronize()
        if self._before is not None and not step.begins:
            seconds = _between(self._before, step.end)
            self._all.add(step.batch, seconds, step.starved)
            if step.settled:
                self._steady.add(step.batch, seconds, step.starved)
        self._before = step.end


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ended(mark: Mark) -> bool:
    return not isinstance(mark, torch.cuda.Event) or bool(mark.query())


def _between(start: Mark, end: Mark) -> float:
    """Seconds."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


class _Sums:
    """Totals over some steps."""

    def __init__(self) -> None:
        self.steps = self.tokens = self.computed = 0
        self.seconds = self.starved = 0.0

    def add(self, batch: StepBatch, seconds: float, starved: float) -> None:
        self.steps += 1
        self.tokens += batch.tokens
        self.computed += sum(micro.shape.tokens for micro in batch.micro)
        self.seconds += seconds
        self.starved += starved

    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class _Host:
    """The host's own time in the steps that measure it."""

    def __init__(self) -> None:
        self.seconds, self.micro = 0.0, 0

    def add(self, seconds: float, micro: int) -> None:
        self.seconds += seconds
        self.micro += micro

    def milliseconds(self) -> float:
        """Per micro-batch; 0 before one was measured."""
        return 1e3 * self.seconds / max(1, self.micro)
