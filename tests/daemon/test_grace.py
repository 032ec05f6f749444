"""Stops: a checkpoint within the grace period, and nothing is left running (test 5)."""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import pytest
from daemon_harness import FAST, Harness, drop, places, runner_pid, spec_text, status, trains, wait_until
from dropforge.daemon import attempts, process
from dropforge.daemon.control import Switch, set_switch
from dropforge.daemon.singleton import daemon_is_alive
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from test_random_kills import drop_real_jobs, real_daemon


@pytest.mark.parametrize("grace", [10.0, 60.0, 600.0])
def test_a_job_that_saves_needs_none_of_its_grace(root: DataRoot, grace: float) -> None:
    drop(root, "job.yaml", spec_text("steps-100000 delay-20 save-1000 child"))
    with Harness(root, options=replace(FAST, grace_seconds=grace)) as harness:
        harness.until(lambda: places(root).get("running") and trains(root.run(places(root)["running"][0])))
        run = root.run(places(root)["running"][0])
        set_switch(root, Switch.PAUSE, on=True)  # or it would start again at once
        sleeper = int((run.path / "sleeper").read_text())
        pid = runner_pid(run)
        began = time.monotonic()
        harness.daemon._worker.ask_to_stop(run.id, Reason.SHUTDOWN, now=harness.now)
        harness.until_in("queue")
        assert time.monotonic() - began < 5
    assert status(run)["state"] == "interrupted"
    assert attempts.newest_checkpoint(run) > 0
    assert process.ProcessId.of(pid) is None and process.ProcessId.of(sleeper) is None


@pytest.mark.slow
def test_the_real_trainer_saves_within_an_engines_ten_seconds(root: DataRoot, record_property) -> None:
    """From SIGTERM to the end of the daemon, four times at random moments of a training."""
    drop_real_jobs(root)
    times = []
    for number in range(4):
        daemon = real_daemon(root)
        wait_until(lambda: daemon_is_alive(root), seconds=60)
        wait_until(lambda: any(status(root.run(job)).get("state") == "training" and status(root.run(job)).get("step", 0) > 2
                               for job in places(root).get("running", [])), seconds=180)  # fmt: skip
        time.sleep(0.3 * number)
        (job_id,) = places(root)["running"]
        before = attempts.newest_checkpoint(root.run(job_id))
        began = time.monotonic()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(120) == 143
        times.append(time.monotonic() - began)
        if job_id in places(root).get("queue", []):
            assert attempts.newest_checkpoint(root.run(job_id)) >= before
            assert status(root.run(job_id))["state"] == "interrupted"
    record_property(
        "measured", "SIGTERM to the end of the daemon: " + ", ".join(f"{seconds:.1f} s" for seconds in times)
    )
    assert max(times) < 10
