"""Kill -9 at every labelled point, start again: the same end, no job lost, none done twice."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from daemon_harness import (
    DaemonProcess,
    Harness,
    drop,
    expected_sum,
    places,
    runner_pid,
    spec_text,
    status,
    trains,
    wait_until,
)
from dropforge.daemon import attempts, process
from dropforge.daemon.control import request
from dropforge.daemon.crash_points import CRASH_POINTS
from dropforge.daemon.lease import holder
from dropforge.daemon.queue import FOLDERS, put, read, ticket_path
from dropforge.daemon.singleton import daemon_is_alive
from dropforge.errors import EnvironmentFault
from dropforge.paths import DataRoot

STEPS = 6


def drop_everything(root: DataRoot, *, as_folder: bool) -> None:
    """A good job, a bad file, and (for control.done) a request about the good job comes later."""
    text = spec_text(f"good steps-{STEPS}")
    if as_folder:
        (root.inbox / "good.job").mkdir()
        (root.inbox / "good.job" / "job.yaml").write_text(text.replace("rows.jsonl", "own.jsonl"))
        (root.inbox / "good.job" / "own.jsonl").write_text("{}\n")
    else:
        drop(root, "good.yaml", text)
    drop(root, "bad.yaml", spec_text(extra="nonsense: 1\n"))


def every_file_is_somewhere_once(root: DataRoot) -> None:
    """The invariant after any crash: each file is in the inbox, rejected, or has exactly one ticket place."""
    good = list(root.inbox.glob("good.*"))
    tickets = [path for folder in FOLDERS for path in (root.path / folder).glob("*-good-*.json")]
    claimed_folders = [run for run in (root.path / "runs").glob("*-good-*") if (run / "data").is_dir()]
    assert len(good) + max(len(tickets), len(claimed_folders)) == 1, (good, tickets, claimed_folders)
    bad = list(root.inbox.glob("bad.yaml")) + list(root.rejected.glob("*/bad.yaml"))
    assert len(bad) == 1


def ended_right(root: DataRoot) -> None:
    found = places(root)
    assert list(found) == ["done"]
    (job_id,) = found["done"]
    run = root.run(job_id)
    assert (run.path / "final").read_text() == expected_sum(STEPS)
    assert status(run)["state"] == "succeeded"
    assert [path.name for path in (root.path / "runs").iterdir()] == [job_id]
    (rejected,) = root.rejected.iterdir()
    assert sorted(path.name for path in rejected.iterdir()) == ["ERROR.txt", "bad.yaml", "error.json"]
    assert [path.name for path in root.inbox.iterdir()] == [".staging"]


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("point", [point for point in CRASH_POINTS if point != "control.done"])
def test_kill_9_at_every_crash_point(root: DataRoot, point: str, as_folder: bool) -> None:
    drop_everything(root, as_folder=as_folder)
    with DaemonProcess(root, die_at=point) as daemon:
        assert daemon.wait() == -signal.SIGKILL, "the point was never reached"
    every_file_is_somewhere_once(root)
    with Harness(root) as harness:
        harness.until(lambda: places(root).get("done") and list(root.rejected.iterdir()))
    ended_right(root)


def test_kill_9_while_a_request_is_carried_out(root: DataRoot) -> None:
    drop_everything(root, as_folder=False)
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("done"))
        daemon.kill()
    (job_id,) = places(root)["done"]
    ticket_path(root, "done", job_id).rename(ticket_path(root, "failed", job_id))
    request(root, job_id, "retry")
    with DaemonProcess(root, die_at="control.done") as daemon:
        assert daemon.wait() == -signal.SIGKILL
    with Harness(root) as harness:
        harness.until_in("done")
        harness.tick(times=3)
    ended_right(root)
    assert list(root.control.iterdir()) == []


@pytest.mark.parametrize("point", ["intake.ticket-written", "start.spawned", "end.ticket-moved"])
def test_kill_9_twice_at_the_same_point(root: DataRoot, point: str) -> None:
    drop_everything(root, as_folder=False)
    for name in ("second", "third"):
        drop(root, f"{name}.yaml", spec_text(f"{name} steps-{STEPS}"))
    for _ in range(2):
        with DaemonProcess(root, die_at=point) as daemon:
            assert daemon.wait() == -signal.SIGKILL
    with Harness(root) as harness:
        harness.until_in("done", count=3)
    for job_id in places(root)["done"]:
        assert (root.run(job_id).path / "final").read_text() == expected_sum(STEPS)


def test_kill_9_of_the_daemon_during_training(root: DataRoot) -> None:
    drop(root, "long.yaml", spec_text("steps-60 delay-20 save-1000"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running") and trains(root.run(places(root)["running"][0])))
        run = root.run(places(root)["running"][0])
        pid = runner_pid(run)
        daemon.kill()
    # The runner learns of the death, saves and ends by itself: nothing trains on without a daemon.
    wait_until(lambda: process.ProcessId.of(pid) is None)
    assert attempts.newest_checkpoint(run) > 0
    with Harness(root) as harness:
        harness.until_in("done")
    assert (run.path / "final").read_text() == expected_sum(60)
    assert attempts.numbers(run) == [1, 2]


def test_kill_9_of_daemon_and_runner_together(root: DataRoot) -> None:
    drop(root, "long.yaml", spec_text("steps-60 delay-20 save-3"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running"))
        run = root.run(places(root)["running"][0])
        wait_until(lambda: attempts.newest_checkpoint(run) >= 3)
        process.kill(runner_pid(run))
        daemon.kill()
    with Harness(root) as harness:
        harness.until_in("done")
    assert (run.path / "final").read_text() == expected_sum(60)


def test_a_deaf_runner_of_a_dead_daemon_is_killed_before_the_job_starts_again(root: DataRoot) -> None:
    drop(root, "deaf.yaml", spec_text("deaf steps-100000 delay-20 save-1000"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running") and trains(root.run(places(root)["running"][0])))
        old = holder(root.run(places(root)["running"][0]))
        daemon.kill()
    assert old is not None
    assert old.alive()
    with Harness(root) as harness:
        assert not old.alive()
        harness.until_in("running")


def test_sigterm_saves_and_a_second_one_does_not_wait(root: DataRoot) -> None:
    drop(root, "deaf.yaml", spec_text("deaf steps-100000 delay-20"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running") and trains(root.run(places(root)["running"][0])))
        run = root.run(places(root)["running"][0])
        pid = runner_pid(run)
        daemon.terminate()
        wait_until(lambda: attempts.read_stop(run, 1) is not None)
        daemon.terminate()
        assert daemon.wait(4.0) == 128 + signal.SIGTERM  # less than the grace period of 5 s
    assert process.ProcessId.of(pid) is None
    assert places(root) == {"queue": [run.id]}
    assert status(run)["state"] == "interrupted"


def test_a_second_daemon_on_the_same_root_refuses(root: DataRoot) -> None:
    with Harness(root):
        assert daemon_is_alive(root)
        with DaemonProcess(root) as second:
            assert second.wait() == 3
        with pytest.raises(EnvironmentFault) as caught, Harness(root):
            pass
        assert caught.value.code == "daemon-running"
    assert not daemon_is_alive(root)


def test_a_claimed_file_that_was_changed_before_the_crash_goes_back_to_the_inbox(root: DataRoot) -> None:
    drop(root, "good.yaml", spec_text(f"good steps-{STEPS}"))
    with DaemonProcess(root, die_at="intake.claimed") as daemon:
        assert daemon.wait() == -signal.SIGKILL
    (claimed,) = (root.path / "queue").glob("*.json")
    claimed.write_text(spec_text(f"better steps-{STEPS}"))
    with Harness(root) as harness:
        harness.until_in("done")
    assert "-better-" in places(root)["done"][0]


def test_a_ticket_deleted_while_the_daemon_was_down_is_a_cancelled_job(root: DataRoot) -> None:
    drop(root, "good.yaml", spec_text("good"))
    with DaemonProcess(root, die_at="intake.accepted") as daemon:
        assert daemon.wait() == -signal.SIGKILL
    (ticket,) = (root.path / "queue").glob("*.json")
    ticket.unlink()
    with Harness(root) as harness:
        harness.tick(times=3)
        assert places(root) == {"cancelled": [ticket.stem]}


def test_the_data_root_may_move_to_another_path(root: DataRoot, tmp_path: Path) -> None:
    drop(root, "long.yaml", spec_text("steps-60 delay-20 save-3"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running"))
        run = root.run(places(root)["running"][0])
        wait_until(lambda: attempts.newest_checkpoint(run) >= 3)
        process.kill(runner_pid(run))
        daemon.kill()
    moved = DataRoot(root.path.rename(tmp_path / "elsewhere"))
    with Harness(moved) as harness:
        harness.until_in("done")
    assert (moved.run(run.id).path / "final").read_text() == expected_sum(60)
    moved.path.rename(root.path)


def test_a_status_that_contradicts_the_place_is_put_right(root: DataRoot) -> None:
    drop(root, "good.yaml", spec_text("good"))
    with DaemonProcess(root, die_at="intake.accepted") as daemon:
        assert daemon.wait() == -signal.SIGKILL
    (job_id,) = places(root)["queue"]
    ticket = read(ticket_path(root, "queue", job_id))
    assert ticket is not None
    ticket_path(root, "queue", job_id).unlink()
    put(root, "held", ticket)
    with Harness(root):
        assert status(root.run(job_id))["state"] == "held"
