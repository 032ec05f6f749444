"""Rates are those of finished steps, and the host's time is the time in which it waits for nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from dropforge.fast_step import meter as module
from dropforge.fast_step.meter import IN_FLIGHT, SAMPLED_EARLY, StepMeter
from dropforge.fast_step.report import FastReport

BATCH = SimpleNamespace(tokens=1000, micro=(SimpleNamespace(shape=SimpleNamespace(tokens=1024)),) * 2)


class Device:
    """A host that queues a step in 2 ms, and a device that takes 100 ms for it; time is what the test says it is."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.free = 0.0
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait(self.free))
        for name in ("max_memory_allocated", "max_memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
        self.report = FastReport()
        self.meter = StepMeter(
            self.report, device=torch.device("cuda", 0), clock=lambda: self.now, mark=lambda: Event(self, self.free)
        )

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)

    def step(self, *, changes: int, seconds: float = 0.1) -> None:
        for _ in range(2):
            self.meter.micro_batch()
            self.now += 0.001
            self.free = max(self.free, self.now) + seconds / 2
        self.meter.step(BATCH, changes=changes)


class Event:
    def __init__(self, device, at) -> None:
        self.device, self.at = device, at

    def query(self):
        return self.at <= self.device.now

    def synchronize(self):
        self.device.wait(self.at)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_the_last_steps_in_the_queue_do_not_count_before_they_end(monkeypatch):
    """After a wait the host queues several steps at once: that is no rate."""
    device = Device(monkeypatch)
    for _ in range(10):
        device.step(changes=2)
    torch.cuda.synchronize()
    for _ in range(IN_FLIGHT):
        device.step(changes=2)
    device.meter.update()
    assert device.report.steady_tokens_per_second == pytest.approx(1000 / 0.1, rel=0.03)


def test_steps_that_capture_are_not_steady(monkeypatch):
    device = Device(monkeypatch)
    for changes, seconds in ((1, 5.0), (2, 3.0), (2, 0.1), (2, 0.1), (3, 2.0), (3, 0.1), (3, 0.1)):
        device.step(changes=changes, seconds=seconds)
    torch.cuda.synchronize()
    device.meter.update()
    assert device.report.steady_tokens_per_second == pytest.approx(1000 / 0.1, rel=0.03)
    assert device.report.tokens_per_second == pytest.approx(6000 / 5.4, rel=0.05)


def test_host_time_is_what_is_not_waiting(monkeypatch):
    device = Device(monkeypatch)
    for _ in range(max(SAMPLED_EARLY) + 2):
        device.step(changes=0)
    device.meter.update()
    assert device.report.host_ms_per_micro_batch == pytest.approx(1.0)
    assert device.now > 1.0  # it did wait


def test_a_pause_belongs_to_no_step(monkeypatch):
    device = Device(monkeypatch)
    for _ in range(6):
        device.step(changes=0)
    torch.cuda.synchronize()
    device.meter.pause()
    device.free = device.now = device.now + 60.0
    for _ in range(6):
        device.step(changes=0)
    torch.cuda.synchronize()
    device.meter.update()
    assert device.report.steady_tokens_per_second == pytest.approx(1000 / 0.1, rel=0.03)
    assert device.report.host_ms_per_micro_batch == pytest.approx(1.0)


def test_without_a_gpu_the_clock_alone_counts():
    now = [0.0]
    report = FastReport()
    meter = StepMeter(report, device=torch.device("cpu"), clock=lambda: now[0])
    for _ in range(5):
        now[0] += 0.5
        with meter.waiting(data=True):
            now[0] += 0.1
        meter.step(BATCH, changes=1)
    meter.update()
    assert report.steady_tokens_per_second == pytest.approx(1000 / 0.6, rel=1e-3)
    assert report.host_ms_per_micro_batch == pytest.approx(250.0)
    assert report.wait_for_data_ms_per_step == pytest.approx(100.0)
    assert report.first_step_seconds == pytest.approx(0.6)


def test_few_steps_of_many_are_waited_for():
    assert len(SAMPLED_EARLY) + 200 // module.SAMPLED < 10
