"""Whole jobs with a fake trainer in real child processes: ends, stops, deaths, resumption, control."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_harness import (
    FAKE_RUNNER,
    FAST,
    Harness,
    drop,
    expected_sum,
    only_ticket,
    places,
    runner_pid,
    spec_text,
    status,
    trains,
)
from dropforge.daemon import attempts, process
from dropforge.daemon.control import Switch, is_on, request, set_switch
from dropforge.daemon.loop import Daemon, DaemonOptions
from dropforge.daemon.query import list_jobs
from dropforge.daemon.queue import ticket_path
from dropforge.daemon.submit import submit
from dropforge.files import read_json, read_json_lines
from dropforge.paths import DataRoot, RunFolder
from dropforge.spec import Spec
from dropforge.spec_check import CheckedSpec
from dropforge.spec_defaults import resolve
from dropforge.spec_file import parse
from dropforge.states import State


def start(harness: Harness, name: str, *, extra: str = "", until: str = "") -> RunFolder:
    """Drop a job and wait until it has ended in `until`, or (empty) until it trains."""
    before = {ticket for found in places(harness.root).values() for ticket in found}
    drop(harness.root, f"{name}.yaml", spec_text(name, extra=extra))
    new: set[str] = set()

    def appeared() -> bool:
        new.update({ticket for found in places(harness.root).values() for ticket in found} - before)
        return bool(new)

    harness.until(appeared)
    run = harness.root.run(new.pop())
    if until:
        harness.until(lambda: run.id in places(harness.root).get(until, []))
    else:
        harness.until(lambda: trains(run))
    return run


def actions(run: RunFolder) -> list[str]:
    return [event["action"] for event in read_json_lines(run.events)]


def states(run: RunFolder) -> list[str]:
    return [event["state"] for event in read_json_lines(run.events) if event["action"] == "state"]


def test_a_job_goes_from_the_inbox_to_done(harness: Harness) -> None:
    run = start(harness, "plain", until="done")
    assert states(run) == ["queued", "preparing", "training", "exporting", "succeeded"]
    assert (run.path / "final").read_text() == expected_sum(5)
    assert status(run)["state"] == "succeeded"
    end = attempts.read_end(run, 1)
    assert end is not None
    assert (end.state, end.progress.step, end.died) == (State.SUCCEEDED, 5, False)
    assert places(harness.root) == {"done": [run.id]}


@pytest.mark.parametrize(
    ("name", "folder", "reason", "words"),
    [
        ("fail-at-3", "failed", "nan_loss", "the loss became nan"),
        ("crash-at-3", "failed", "crash", "RuntimeError: a bug in the job"),
        ("partial", "partial", "export", ""),
        ("disk", "held", "disk", "disk too small"),
    ],
)
def test_ends_of_its_own(harness: Harness, name: str, folder: str, reason: str, words: str) -> None:
    run = start(harness, name, until=folder)
    assert status(run)["reason"] == reason
    assert words in status(run)["message"]
    harness.tick(times=5)
    assert places(harness.root) == {folder: [run.id]}


def test_the_traceback_is_in_the_log(harness: Harness) -> None:
    run = start(harness, "crash-at-1", until="failed")
    assert "Traceback" in (run.attempt(1) / "log.txt").read_text()


def test_a_failed_job_does_not_stop_the_next(harness: Harness) -> None:
    drop(harness.root, "junk.yaml", "\x00\x01")
    start(harness, "crash-at-1", until="failed")
    start(harness, "segv-at-1 steps-1", until="held")
    start(harness, "good", until="done")
    assert len(places(harness.root)["failed"]) == 1


def test_jobs_run_one_at_a_time_by_priority_and_order(harness: Harness) -> None:
    set_switch(harness.root, Switch.PAUSE, on=True)
    harness.tick()
    for name, priority in (("first", 50), ("second", 50), ("urgent", 90), ("later", 10)):
        drop(harness.root, f"{name}.yaml", spec_text(name, extra=f"resources: {{priority: {priority}}}\n"))
        harness.tick(times=3)
    harness.until_in("queue", count=4)
    harness.tick(times=3)
    assert {job.waiting_for for job in list_jobs(harness.root)} <= {"", "paused (control/pause)"}
    assert all(status(harness.root.run(j.id))["waiting_for"].startswith("pause") for j in list_jobs(harness.root))
    assert "running" not in places(harness.root)
    request(harness.root, next(j.id for j in list_jobs(harness.root) if j.name == "later"), "priority", priority=70)
    set_switch(harness.root, Switch.PAUSE, on=False)
    seen: list[str] = []

    def all_done() -> bool:
        running = places(harness.root).get("running", [])
        assert len(running) <= 1
        seen.extend(job_id for job_id in running if job_id not in seen)
        return len(places(harness.root).get("done", [])) == 4

    harness.until(all_done)
    assert [job_id.split("-")[1] for job_id in seen] == ["urgent", "later", "first", "second"]


def test_cancel_of_a_queued_job_is_immediate(harness: Harness) -> None:
    set_switch(harness.root, Switch.PAUSE, on=True)
    run = start(harness, "waits", until="queue")
    request(harness.root, run.id, "cancel")
    harness.tick(times=2)
    assert only_ticket(harness.root) == ("cancelled", run.id)
    assert list(harness.root.control.glob("*.cancel")) == []


def test_deleting_a_queued_ticket_cancels_and_retry_brings_it_back(harness: Harness) -> None:
    set_switch(harness.root, Switch.PAUSE, on=True)
    run = start(harness, "deleted", until="queue")
    ticket_path(harness.root, "queue", run.id).unlink()
    harness.tick(times=2)
    assert only_ticket(harness.root) == ("cancelled", run.id)
    set_switch(harness.root, Switch.PAUSE, on=False)
    request(harness.root, run.id, "retry")
    harness.until_in("done")


def test_cancel_of_a_running_job_saves_and_retry_resumes(harness: Harness) -> None:
    run = start(harness, "steps-40 delay-20 save-1000")
    request(harness.root, run.id, "cancel")
    harness.until_in("cancelled")
    saved = attempts.newest_checkpoint(run)
    assert saved > 0
    assert status(run)["reason"] == "user"
    assert list(harness.root.control.glob("*.cancel")) == []
    request(harness.root, run.id, "retry")
    harness.until_in("done")
    assert (run.path / "final").read_text() == expected_sum(40)
    assert {"action": "resumed", "step": saved}.items() <= next(
        event for event in read_json_lines(run.events) if event["action"] == "resumed"
    ).items()


def test_a_cancelling_job_is_shown_as_such(harness: Harness) -> None:
    run = start(harness, "deaf steps-500 delay-20")
    request(harness.root, run.id, "cancel")
    harness.tick(times=2)
    assert list_jobs(harness.root)[0].state is State.CANCELLING


def test_a_job_that_ignores_the_request_is_killed_after_the_grace_period(harness: Harness) -> None:
    run = start(harness, "deaf steps-2000 delay-20")
    request(harness.root, run.id, "cancel")
    harness.tick(times=2)
    assert places(harness.root) == {"running": [run.id]}
    harness.tick(FAST.grace_seconds + 1)
    harness.until_in("cancelled")
    assert process.session_members(runner_pid(run)) == []


def test_checkpoint_on_request(harness: Harness) -> None:
    run = start(harness, "steps-60 delay-20 save-1000")
    request(harness.root, run.id, "checkpoint")
    harness.until(lambda: attempts.newest_checkpoint(run) > 0)
    harness.until_in("done")
    assert (run.path / "final").read_text() == expected_sum(60)


def test_nothing_the_job_started_outlives_it(harness: Harness) -> None:
    run = start(harness, "child steps-3", until="done")
    sleeper = int((run.path / "sleeper").read_text())
    harness.until(lambda: process.ProcessId.of(sleeper) is None)


def test_a_time_limit_ends_the_job_over_all_attempts(harness: Harness) -> None:
    run = start(harness, "steps-1000 delay-20", extra="resources: {time_limit: 1h}\n")
    harness.tick(3590)
    assert places(harness.root) == {"running": [run.id]}
    harness.tick(20)
    harness.until_in("failed")
    assert status(run)["reason"] == "timeout"
    assert attempts.newest_checkpoint(run) > 0


def test_a_killed_runner_resumes_and_ends_as_if_nothing_had_happened(harness: Harness) -> None:
    run = start(harness, "steps-30 delay-20")
    harness.until(lambda: attempts.newest_checkpoint(run) >= 4)
    os.kill(runner_pid(run), signal.SIGKILL)
    harness.until_in("done")
    assert (run.path / "final").read_text() == expected_sum(30)
    assert "interrupted" in states(run)
    first = attempts.read_end(run, 1)
    assert first is not None
    assert (first.died, first.reason) == (True, "killed")
    assert attempts.numbers(run) == [1, 2]


def test_a_death_for_lack_of_memory_is_named_and_not_repeated(root: DataRoot) -> None:
    with Harness(root) as harness:
        kills = 0
        harness.daemon._worker._oom_kills = lambda: kills
        run = start(harness, "steps-500 delay-20")
        kills = 1
        os.kill(runner_pid(run), signal.SIGKILL)
        harness.until_in("failed")
        assert status(run)["reason"] == "oom_host"
        assert "memory" in status(run)["message"]


def test_a_data_worker_that_the_kernel_killed_is_named(harness: Harness) -> None:
    """The job itself lives and only sees that a child of its is gone; the kernel's counter tells why."""
    kills = 0
    harness.daemon._worker._oom_kills = lambda: kills
    run = start(harness, "crash-at-30 steps-40 delay-20")
    kills = 1
    harness.until_in("failed")
    assert status(run)["reason"] == "oom_host"
    assert "the job said: RuntimeError" in status(run)["message"]


def test_a_poison_job_is_held_after_two_deaths_and_released_by_a_person(harness: Harness) -> None:
    run = start(harness, "segv-at-3 save-100", until="held")
    assert status(run)["reason"] == "crash"
    assert "SIGSEGV" in status(run)["message"]
    assert attempts.numbers(run) == [1, 2]
    request(harness.root, run.id, "release")
    harness.until(lambda: attempts.numbers(run) == [1, 2, 3, 4] and places(harness.root).get("held"))


def test_a_held_job_can_be_cancelled(harness: Harness) -> None:
    run = start(harness, "disk", until="held")
    request(harness.root, run.id, "cancel")
    harness.until_in("cancelled")
    assert only_ticket(harness.root) == ("cancelled", run.id)


def test_requests_that_make_no_sense_are_cleared_away(harness: Harness) -> None:
    run = start(harness, "plain", until="done")
    (harness.root.control / f"{run.id}.cancel").touch()
    (harness.root.control / "nobody.retry").touch()
    (harness.root.control / "odd").mkdir()
    harness.tick(times=3)
    assert [path.name for path in harness.root.control.iterdir()] == ["odd"]
    assert only_ticket(harness.root) == ("done", run.id)


def test_stopping_the_daemon_saves_and_a_new_one_resumes(root: DataRoot) -> None:
    with Harness(root) as harness:
        run = start(harness, "steps-40 delay-20 save-1000")
        harness.daemon.stop()
        harness.daemon.run()
        assert only_ticket(root) == ("queue", run.id)
        assert status(run)["state"] == "interrupted"
        saved = attempts.newest_checkpoint(run)
        assert saved > 0
    assert read_json(root.state / "daemon.json")["state"] == "stopped"
    with Harness(root) as harness:
        harness.until_in("done")
    assert (run.path / "final").read_text() == expected_sum(40)
    assert attempts.numbers(run) == [1, 2]


def test_stop_requested_before_the_loop_starts(root: DataRoot) -> None:
    with Harness(root) as harness:
        harness.daemon.stop()
        began = time.monotonic()
        harness.daemon.run()
        assert time.monotonic() - began < 2


def test_drain_finishes_what_runs_starts_nothing_and_ends(root: DataRoot) -> None:
    with Harness(root) as harness:
        run = start(harness, "steps-20 delay-20")
        set_switch(root, Switch.DRAIN, on=True)
        drop(root, "later.yaml", spec_text("later"))
        harness.until_in("queue")
        harness.daemon._clock = time.monotonic
        harness.daemon._next_look = 0
        harness.daemon.run()
        assert places(root)["done"] == [run.id]
        assert len(places(root)["queue"]) == 1
        assert not is_on(root, Switch.DRAIN)


def test_gpus_are_given_out_and_what_cannot_fit_says_so(root: DataRoot) -> None:
    def check_any(raw: bytes, *, filename: str) -> CheckedSpec:  # jobs on several GPUs are not in this release's check
        spec = Spec.model_validate_json(json.dumps(parse(raw, filename=filename).value))
        return CheckedSpec(spec=spec, resolved=resolve(spec))

    with Harness(root, options=replace(FAST, gpus=("GPU-a", "GPU-b")), check=check_any) as harness:
        one = start(harness, "one steps-500 delay-20")
        two = start(harness, "two steps-500 delay-20")
        large = start(harness, "large", extra="resources: {gpus: 3}\n", until="queue")
        harness.tick(times=2)
        assert (status(one)["slots"], status(two)["slots"]) == (["GPU-a"], ["GPU-b"])
        environment = [Path(f"/proc/{runner_pid(run)}/cmdline").read_bytes() for run in (one, two)]
        assert [b"GPU-a" in environment[0], b"GPU-b" in environment[1]] == [True, True]
        assert status(large)["waiting_for"] == "gpu: asks for 3 GPUs, this machine has 2 GPUs"


def test_a_warm_runner_takes_one_job_and_is_replaced(root: DataRoot) -> None:
    with Harness(root, options=replace(FAST, warm=True)) as harness:
        harness.tick()
        first = harness.daemon._worker._warm
        assert first is not None
        run = start(harness, "warm", until="done")
        assert runner_pid(run) == first.pid
        assert (run.path / "final").read_text() == expected_sum(5)
        harness.tick()
        second = harness.daemon._worker._warm
        assert second is not None
        assert second.pid != first.pid
    assert process.ProcessId.of(second.pid) is None


def test_a_warm_runner_that_died_is_no_loss(root: DataRoot) -> None:
    with Harness(root, options=replace(FAST, warm=True)) as harness:
        harness.tick()
        harness.daemon._worker._warm.kill()
        time.sleep(0.05)
        start(harness, "cold", until="done")


def test_a_runner_that_cannot_even_start_is_held_with_a_reason(root: DataRoot) -> None:
    with Harness(root) as harness:
        harness.daemon._worker._command = ["/nonexistent/python"]
        drop(root, "a.yaml")
        harness.until(lambda: harness.tick(31) or places(root).get("held"))
        run = root.run(only_ticket(root)[1])
        assert status(run)["reason"] == "internal"


def test_a_data_root_that_is_full_keeps_the_file_and_goes_on_later(harness: Harness, monkeypatch) -> None:
    import dropforge.daemon.intake as intake_module

    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(intake_module, "fill_new_folder", full)
        path = drop(harness.root, "a.yaml")
        harness.tick(times=5)
        assert path.exists()
        assert list((harness.root.path / "runs").iterdir()) == []
        harness.tick(3)
        assert "No space left" in read_json(harness.root.queue_json)["problems"][0]
        assert "No space left" in harness.root.status_page.read_text()
    harness.tick(31)
    harness.until_in("done")


def test_edits_by_hand_do_not_stop_the_daemon(harness: Harness) -> None:
    run = start(harness, "edited steps-40 delay-20")
    (harness.root.path / "queue" / "nonsense.json").write_text("{")
    (harness.root.path / "queue" / "list.json").write_text("[1]")
    (harness.root.path / "held" / "other.json").symlink_to("/etc/passwd")
    run.lease.write_text("nonsense")
    run.status.write_text("{torn")
    harness.until_in("done")
    start(harness, "next", until="done")


def test_from_submit_to_the_start_of_the_runner(root: DataRoot, tmp_path: Path) -> None:
    """The real settings, the real check in a limited child: a submitted job does not settle first."""
    spec = tmp_path / "quick.yaml"
    spec.write_text(spec_text("quick"))
    with Daemon(root, options=DaemonOptions(warm=False), runner_command=FAKE_RUNNER) as daemon:
        daemon.tick()
        submit(root, spec)
        began = time.monotonic()
        while not places(root).get("running"):
            daemon.tick()
            time.sleep(0.05)
            assert time.monotonic() - began < 20
        assert time.monotonic() - began < 10, "generous, for busy machines; about 1 s on a quiet one"
