"""Faults that may pass by themselves: tried again after a delay, not for ever."""

from __future__ import annotations

import errno

import pytest
from daemon_harness import Harness, drop, only_ticket, places, spec_text, status
from dropforge.daemon import attempts
from dropforge.daemon.unexpected import end_of_unexpected, no_space_in
from dropforge.errors import Reason


def test_a_job_without_network_waits_and_succeeds_when_it_is_back(harness: Harness) -> None:
    def run():
        return harness.root.run(only_ticket(harness.root)[1])

    drop(harness.root, "a.yaml", spec_text("offline once"))
    harness.until(lambda: places(harness.root).get("queue") and attempts.numbers(run()) == [1])
    harness.tick(times=3)
    assert status(run())["waiting_for"].startswith("backoff: ")
    assert (status(run())["state"], status(run())["reason"]) == ("interrupted", "offline")
    assert not run().error_text.exists()
    harness.tick(50)
    assert places(harness.root) == {"queue": [run().id]}
    harness.tick(15)
    harness.until_in("done")
    assert attempts.numbers(run()) == [1, 2]


@pytest.mark.parametrize(("name", "reason"), [("offline", "offline"), ("lose-gpu", "gpu_lost")])
def test_a_fault_that_stays_fails_after_three_attempts(harness: Harness, name: str, reason: str) -> None:
    drop(harness.root, "a.yaml", spec_text(name))
    harness.until(lambda: harness.tick(70) or places(harness.root).get("failed"))
    run = harness.root.run(only_ticket(harness.root)[1])
    assert attempts.numbers(run) == [1, 2, 3]
    assert status(run)["reason"] == reason
    assert "given up after 3 tries" in status(run)["message"]


def test_another_job_runs_while_one_rests(harness: Harness) -> None:
    drop(harness.root, "a.yaml", spec_text("offline"))
    harness.until(
        lambda: places(harness.root).get("queue") and list(harness.root.path.glob("runs/*/attempts/001/exit.json"))
    )
    drop(harness.root, "b.yaml", spec_text("other"))
    harness.until_in("done")
    assert len(places(harness.root)["queue"]) == 1


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EDQUOT, "quota"), Reason.DISK),
        (RuntimeError("[enforce fail at inline_container.cc:626] No space left on device"), Reason.DISK),
        (MemoryError(), Reason.OOM_HOST),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Reason.OOM_GPU),
        (RuntimeError("CUDA error: unknown error"), Reason.GPU_LOST),
        (RuntimeError("CUDA error: device-side assert triggered"), Reason.CRASH),
        (ValueError("unknown error"), Reason.CRASH),
    ],
)
def test_the_reason_for_what_nobody_raised_on_purpose(error: Exception, reason: Reason) -> None:
    assert end_of_unexpected(error).reason is reason


def test_a_full_disk_is_seen_through_wrapping() -> None:
    outer = RuntimeError("could not save")
    outer.__cause__ = OSError(errno.ENOSPC, "full")
    assert no_space_in(outer)
    assert not no_space_in(RuntimeError("could not save"))
