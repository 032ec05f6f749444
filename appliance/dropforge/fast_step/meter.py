"""Where a training's time goes: tokens per second, and the host's own time per micro-batch.

A launch into a full queue waits for the GPU inside the driver, where it cannot be told from work. So the host's time is
taken from single steps that find the queue empty: one in SAMPLED is waited for, and the step after it is measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dropforge.fast_step.report import FastReport
from dropforge.packing.collate import StepBatch

IN_FLIGHT = 2
"""Optimizer steps the host may run ahead of the GPU: enough that it never waits, few enough that stopping is prompt."""

SAMPLED = 32
"""The GPU idles for one step's host time in so many steps."""


class StepMeter:
    """Counts steps and the time in which the host worked, waited for the GPU, or waited for data.

    Args:
        report: gets the rates at every ``update``.
        device: of the training.
        clock: seconds.
    """

    def __init__(
        self, report: FastReport, *, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.report, self.device, self.clock = report, device, clock
        self._events: deque[torch.cuda.Event] = deque()
        self._captures = -1
        self._all = _Sums()
        self._steady = _Sums()
        self._waited = self._starved = 0.0
        self._last: float | None = None
        self._steps = 0
        self._empty_queue = False

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

    def step(self, batch: StepBatch, *, captures: int) -> None:
        """A step has been queued. captures: so far; a new one starts the steady rate anew."""
        self._throttle()
        now = self.clock()
        if self._last is not None:
            seconds = now - self._last
            host = seconds - self._waited - self._starved if self._empty_queue or self.device.type != "cuda" else None
            self._all.add(batch, seconds, host, self._starved)
            if captures != self._captures:
                self._steady = _Sums()
            else:
                self._steady.add(batch, seconds, host, self._starved)
        self._captures = captures
        self._last, self._waited, self._starved = now, 0.0, 0.0
        self._steps += 1
        self._empty_queue = self._steps % SAMPLED == SAMPLED // 4
        if self._empty_queue and self.device.type == "cuda":
            with self.waiting():
                torch.cuda.synchronize(self.device)

    def update(self) -> None:
        """Write the rates into the report."""
        steady = self._steady if self._steady.steps else self._all
        self.report.tokens_per_second = round(self._all.rate(), 1)
        self.report.steady_tokens_per_second = round(steady.rate(), 1)
        self.report.host_ms_per_micro_batch = round(1e3 * steady.host / max(1, steady.sampled), 3)
        self.report.wait_for_data_ms_per_step = round(1e3 * steady.starved / max(1, steady.steps), 3)
        self.report.filled = round(self._all.tokens / max(1, self._all.computed), 4)
        if self.device.type == "cuda":
            self.report.peak_memory = torch.cuda.max_memory_allocated(self.device)
            self.report.peak_reserved = torch.cuda.max_memory_reserved(self.device)

    def _throttle(self) -> None:
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > IN_FLIGHT:
            with self.waiting():
                self._events.popleft().synchronize()


class _Sums:
    """Totals over some steps."""

    def __init__(self) -> None:
        self.steps = self.micro = self.tokens = self.computed = 0
        self.sampled = 0  # micro-batches whose host time was measured
        self.seconds = self.host = self.starved = 0.0

    def add(self, batch: StepBatch, seconds: float, host: float | None, starved: float) -> None:
        self.steps += 1
        self.micro += len(batch.micro)
        self.tokens += batch.tokens
        self.computed += sum(micro.shape.tokens for micro in batch.micro)
        self.seconds += seconds
        if host is not None:
            self.host += host
            self.sampled += len(batch.micro)
        self.starved += starved

    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
