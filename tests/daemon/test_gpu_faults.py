"""The parts of the fault table that need a GPU: `python -m pytest tests/daemon/test_gpu_faults.py -m gpu`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from daemon_harness import FAST, Harness, drop, places, spec_text, status, wait_until
from dropforge.daemon.gpu_memory import read_driver
from dropforge.daemon.lease import holder
from dropforge.daemon.unexpected import end_of_unexpected
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from test_random_kills import REAL_JOBS, adapters, drop_real_jobs

pytestmark = pytest.mark.gpu
HOLD = "import torch, time; kept = torch.empty(int({gib} * 2**30), dtype=torch.uint8, device='cuda'); print('held', flush=True); time.sleep(600)"


def gpu_daemon(root: DataRoot) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DROPFORGE_DATA": str(root.path), "DROPFORGE_SETTLE_SECONDS": "0.5"}
    return subprocess.Popen([sys.executable, "-P", "-m", "dropforge", "watch"], env=environment)


def test_held_memory_is_waited_for(root: DataRoot) -> None:
    """16: another program holds a third of the GPU; the job starts when it ends."""
    (gpu, memory), *_ = read_driver().items()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD.format(gib=memory.total / 3 / 2**30)], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        drop(root, "job.yaml", spec_text("steps-2"))
        with Harness(root, options=replace(FAST, gpus=(gpu,))) as harness:
            harness.until_in("queue")
            harness.tick(6.0, times=2)
            (job_id,) = places(root)["queue"]
            assert "other programs hold the memory" in status(root.run(job_id))["waiting_for"]
            other.kill()
            wait_until(lambda: not read_driver()[gpu].held)
            harness.tick(6.0)
            harness.until_in("done")


def test_memory_that_is_full_is_named_and_returned() -> None:
    """13: the error of the real allocator has the reason oom_gpu, and its process gives everything back."""
    import torch

    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert end_of_unexpected(caught.value).reason is Reason.OOM_GPU


def test_kill_of_the_trainer_on_a_gpu(root: DataRoot, tmp_path) -> None:
    """1 and 4: killed at random moments, the jobs end; their adapters equal those of undisturbed runs."""
    calm = DataRoot(tmp_path / "calm").create()
    for data_root, kills in ((calm, 0), (root, 8)):
        drop_real_jobs(data_root)
        daemon = gpu_daemon(data_root)
        while len(places(data_root).get("done", [])) < REAL_JOBS:
            time.sleep(3.0)
            running = places(data_root).get("running", [])
            held = holder(data_root.run(running[0])) if running else None
            if kills and held is not None:
                os.kill(held.pid, signal.SIGKILL)
                kills -= 1
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(120)
    assert adapters(root) == adapters(calm)
