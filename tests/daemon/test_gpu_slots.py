"""GPUs that others use, that hang, that vanish: jobs wait with numbers, and nothing waits for a driver (tests 15, 16)."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from daemon_harness import FAST, Harness, drop, places, spec_text, status, ticket
from dropforge.daemon import gpu_memory
from dropforge.daemon.gpu_memory import MIB, GpuMemory, GpuWatch, read_driver
from dropforge.daemon.scheduler import schedule
from dropforge.paths import DataRoot

GPU = "GPU-00000000-aaaa"
TOTAL = 24_000 * MIB


def test_a_gpu_that_a_notebook_holds_is_waited_for_with_numbers(root: DataRoot) -> None:
    used = 18_000 * MIB
    options = replace(FAST, gpus=(GPU,), gpu_memory=lambda: {GPU: GpuMemory(used=used, total=TOTAL)})
    drop(root, "job.yaml", spec_text("steps-2"))
    with Harness(root, options=options) as harness:
        harness.until_in("queue")
        harness.tick(3.0, times=2)
        run = root.run(places(root)["queue"][0])
        assert status(run)["waiting_for"] == (
            f"gpu: needs 1 free GPU, 0 of 1 free; other programs hold the memory of {GPU} (18000 of 24000 MiB)"
        )
        used = 300 * MIB
        harness.tick(6.0)
        harness.until_in("done")


def test_memory_that_a_job_has_not_given_back_yet_delays_the_next(root: DataRoot) -> None:
    used = 0
    options = replace(FAST, gpus=(GPU,), gpu_memory=lambda: {GPU: GpuMemory(used=used, total=TOTAL)})
    drop(root, "a.yaml", spec_text("first steps-5"))
    drop(root, "b.yaml", spec_text("second steps-2"))
    with Harness(root, options=options) as harness:
        harness.until_in("running")
        used = 20_000 * MIB
        harness.until_in("done")
        harness.tick(6.0, times=3)
        assert len(places(root)["queue"]) == 1
        used = 0
        harness.tick(6.0)
        harness.until_in("done", count=2)


@pytest.mark.parametrize(
    ("used", "total", "held"), [(500, 80_000, False), (7_900, 80_000, False), (8_000, 80_000, True), (900, 8_000, False),
                                (1_100, 8_000, True)],
)  # fmt: skip
def test_what_counts_as_held(used: int, total: int, held: bool) -> None:
    assert GpuMemory(used=used * MIB, total=total * MIB).held is held


def test_one_held_gpu_does_not_stop_the_other() -> None:
    decided = schedule([ticket(1), ticket(2)], gpus=("a", "b"), busy=(), held={"a": "9 of 10 MiB"})
    assert [slots for _, slots in decided.starts] == [("b",)]
    assert decided.waiting[0][1].kind == "gpu"


def test_a_driver_that_hangs_holds_up_nobody(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "PATIENCE_SECONDS", 0.05)
    answer = threading.Event()
    asked: list[float] = []

    def hang() -> dict[str, GpuMemory]:
        asked.append(time.monotonic())
        answer.wait(60)
        return {}

    drop(root, "job.yaml", spec_text("steps-2"))
    with Harness(root, options=replace(FAST, gpus=(GPU,), gpu_memory=hang)) as harness:
        harness.until_in("done")
        harness.tick(10.0, times=3)
    answer.set()
    assert len(asked) == 1, "not asked again while the first answer is awaited"


def test_a_driver_that_fails_is_no_reason_to_stop() -> None:
    def fail() -> dict[str, GpuMemory]:
        raise OSError("NVML: Unknown Error")

    assert GpuWatch(fail).held({GPU}, now=0.0) == {}


def test_what_the_tool_says(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-a, 1000, 81559'\necho 'GPU-b, [N/A], [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_memory, "_COMMAND", (str(tool),))
    assert read_driver() == {"GPU-a": GpuMemory(used=1000 * MIB, total=81559 * MIB)}
