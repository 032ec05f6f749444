"""Stalls by the job's own pace, and the floor of memory. Time and memory are numbers here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from daemon_harness import FAST, Harness, drop, expected_sum, only_ticket, places, spec_text, status, trains
from dropforge.daemon import attempts
from dropforge.daemon.memory_watch import MIB, MemoryWatch, available_bytes, session_bytes
from dropforge.daemon.stalls import StallWatch
from dropforge.errors import Reason
from dropforge.events import RunLog
from dropforge.paths import DataRoot, RunFolder
from dropforge.states import State


def begin(harness: Harness, name: str) -> RunFolder:
    drop(harness.root, "a.yaml", spec_text(name))
    harness.until(lambda: any(trains(RunFolder(path)) for path in (harness.root.path / "runs").iterdir()))
    return harness.root.run(only_ticket(harness.root)[1])


def first_stall(watch: StallWatch, *, step: int, since: float, until: float) -> float | None:
    """Look every 10 s without a further step; returns the time of the first complaint."""
    times = [since + 10.0 * number for number in range(int((until - since) / 10) + 1)]
    return next((now for now in times if watch.observe("a", 1, step=step, now=now) is not None), None)


def test_slow_is_not_stalled_and_the_budget_is_the_jobs_own() -> None:
    watch = StallWatch(floor=100)
    for step in range(5):
        assert watch.observe("a", 1, step=step, now=step * 50.0) is None
    assert first_stall(watch, step=4, since=200.0, until=3000.0) == 200.0 + 20 * 50.0 + 10.0


def test_a_fast_job_gets_the_floor_and_its_first_step_twice_that() -> None:
    watch = StallWatch(floor=100)
    assert first_stall(watch, step=0, since=0.0, until=3000.0) == 210.0
    assert watch.observe("a", 1, step=300, now=211.0) is None
    assert first_stall(watch, step=300, since=212.0, until=3000.0) == 312.0


def test_a_pause_of_the_whole_container_is_no_stall() -> None:
    watch = StallWatch(floor=100)
    assert [watch.observe("a", 1, step=3, now=now) for now in (0.0, 1.0, 90_000.0, 90_050.0)] == [None] * 4


@pytest.mark.parametrize(
    ("state", "stalls"), [(State.PREPARING, False), (State.TRAINING, True), (State.EXPORTING, False)]
)
def test_only_training_stalls(root: DataRoot, state: State, stalls: bool) -> None:
    run = root.run("000001-x-00000000")
    run.path.mkdir()
    RunLog(run).state(state, step=3)
    watch = StallWatch(floor=10)
    off = StallWatch(floor=0)
    assert any(watch.look(run, 1, now=now * 10.0) for now in range(5)) is stalls
    assert not any(off.look(run, 1, now=now * 10.0) for now in range(5))


@pytest.mark.parametrize("deaf", ["", "deaf "])
def test_a_stalled_job_is_stopped_and_resumed(harness: Harness, deaf: str) -> None:
    run = begin(harness, f"{deaf}steps-8 stuck-at-5 once")
    harness.until(lambda: len(run.metrics.read_text().splitlines()) == 5)
    harness.tick()
    harness.tick(50, times=int(2 * FAST.stall_seconds / 50))
    assert attempts.numbers(run) == [1]
    assert attempts.read_stop(run, 1) is Reason.STALLED
    if deaf:
        harness.tick(FAST.grace_seconds + 1)
    harness.until_in("queue")
    assert (status(run)["state"], status(run)["reason"]) == ("interrupted", "stalled")
    harness.tick(61)
    harness.until_in("done")
    assert (run.path / "final").read_text() == expected_sum(8)


def test_below_the_floor_the_job_saves_and_ends(root: DataRoot) -> None:
    with Harness(root) as harness:
        left = 1000 * MIB
        harness.daemon._guards.memory = MemoryWatch(floor=500 * MIB, available=lambda: left)
        run = begin(harness, "steps-1000 delay-20 save-1000")
        left = 400 * MIB
        harness.until_in("failed")
        assert status(run)["reason"] == "oom_host"
        assert attempts.newest_checkpoint(run) > 0
        drop(root, "b.yaml", spec_text("next"))
        harness.until_in("queue")
        harness.tick(times=3)
        (queued,) = places(root)["queue"]
        assert status(root.run(queued))["waiting_for"] == "memory: 400 MiB of memory are left, the floor is 500 MiB"
        left = 600 * MIB
        harness.until_in("done")


@pytest.mark.parametrize(("left", "seconds"), [(400, 11.0), (100, 0.1)])
def test_a_job_that_does_not_react_is_killed_before_the_machine_freezes(
    root: DataRoot, left: int, seconds: float
) -> None:
    with Harness(root) as harness:
        run = begin(harness, "deaf steps-1000 delay-20")
        harness.daemon._guards.memory = MemoryWatch(floor=500 * MIB, available=lambda: left * MIB)
        harness.tick()
        harness.tick(seconds)
        harness.until_in("failed")
        assert status(run)["reason"] == "oom_host"


def test_memory_as_the_kernel_tells_it(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     800 kB\n")
    group = tmp_path / "group"
    group.mkdir()
    assert available_bytes(tmp_path, group) == 800 * 1024
    (group / "memory.current").write_text("500000\n")
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path, group) == 800 * 1024
    (group / "memory.max").write_text("600000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert available_bytes(tmp_path, group) == 150000
    assert available_bytes(tmp_path / "absent", group) is None
    assert (available_bytes() or 0) > MIB
    assert session_bytes(os.getpid()) > 10 * MIB
