"""A disk that fills up: nothing is lost, states are still written, and jobs go on when there is room."""

from __future__ import annotations

import errno

import pytest
from daemon_harness import Harness, drop, expected_sum, only_ticket, places, spec_text, status
from dropforge.checkpoints import CheckpointStore
from dropforge.daemon import attempts
from dropforge.daemon.attempts import AttemptEnd
from dropforge.daemon.disk import LOW_BYTES, MIB, RESERVE_BYTES, DiskWatch, make_room, reserve_path, with_reserve
from dropforge.daemon.verdict import judge
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from dropforge.states import State


def test_the_reserve_is_taken_given_back_and_taken_again(root: DataRoot) -> None:
    left = 1000 * MIB
    watch = DiskWatch(root, free=lambda folder: left)
    watch.look()
    assert (watch.low, reserve_path(root).stat().st_size) == (False, RESERVE_BYTES)
    assert reserve_path(root).stat().st_blocks * 512 >= RESERVE_BYTES, "really taken, not a hole"
    left = LOW_BYTES - 1
    watch.look()
    assert (watch.low, reserve_path(root).exists()) == (True, False)
    left = LOW_BYTES + 1
    watch.look()
    assert watch.low, "the reserve alone must not switch it back and forth"
    left = LOW_BYTES + RESERVE_BYTES
    watch.look()
    assert (watch.low, reserve_path(root).exists()) == (False, True)


def test_a_state_is_written_from_the_reserve(root: DataRoot) -> None:
    reserve_path(root).touch()
    written: list[bool] = []

    def write() -> None:
        if reserve_path(root).exists():
            raise OSError(errno.ENOSPC, "full")
        written.append(True)

    with_reserve(root, write)
    assert written == [True]
    with pytest.raises(OSError, match="full"):
        with_reserve(root, lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(PermissionError):
        with_reserve(root, lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))


def save(store: CheckpointStore, step: int) -> None:
    store.clean()
    (store.partial / "weights").write_bytes(b"x" * 1000)
    store.commit(store.partial, step)


def test_room_is_made_without_touching_the_newest_good_checkpoint(root: DataRoot) -> None:
    run = root.run("000001-x-00000000")
    store = CheckpointStore(run.checkpoints)
    for step in (1, 2):
        save(store, step)
    store.clean()
    (store.partial / "half").write_bytes(b"x" * 500)
    (run.path / ".tmp-trained").mkdir()
    (run.path / ".tmp-trained" / "part").write_bytes(b"x" * 50)
    assert make_room(run) > 1550
    assert [checkpoint.step for checkpoint in store.all()] == [2]
    assert not (run.path / ".tmp-trained").exists()
    save(store, 3)
    (run.checkpoints / "step-00000003" / "weights").write_bytes(b"torn")
    make_room(run)
    assert [checkpoint.step for checkpoint in store.all()] == [2], "a broken newest one is not what is kept"


def test_a_planned_lack_of_space_is_held_and_a_real_one_waits() -> None:
    planned = AttemptEnd(state=State.FAILED, reason=Reason.DISK)
    real = AttemptEnd(state=State.FAILED, reason=Reason.DISK, no_space=True)
    assert judge([planned], asked=None).state is State.HELD
    assert judge([real], asked=None).state is State.INTERRUPTED


def test_a_job_that_fills_the_disk_waits_with_numbers_and_goes_on_when_there_is_room(root: DataRoot) -> None:
    with Harness(root) as harness:
        left = 100 * MIB
        harness.daemon._disk._measure = lambda folder: left
        drop(root, "a.yaml", spec_text("steps-10 full-at-7 once"))
        harness.until_in("running")
        harness.until_in("queue")
        run = root.run(only_ticket(root)[1])
        harness.tick(times=3)
        assert (status(run)["state"], status(run)["reason"]) == ("interrupted", "disk")
        wanted = "disk: the disk was full; goes on when 164 MiB are free, 100 MiB are free now"
        assert status(run)["waiting_for"] == wanted
        assert [c.step for c in CheckpointStore(run.checkpoints).all()] == [6], "pruned to one"
        harness.tick(100, times=5)
        assert places(root) == {"queue": [run.id]}
        left = 170 * MIB
        harness.until_in("done")
        assert (run.path / "final").read_text() == expected_sum(10)
        assert attempts.numbers(run) == [1, 2]


def test_a_quota_is_tried_again_after_a_while(root: DataRoot) -> None:
    """The disk has plenty of room, so no number of free bytes says when to go on."""
    with Harness(root) as harness:
        harness.daemon._disk._measure = lambda folder: 500_000 * MIB
        drop(root, "a.yaml", spec_text("steps-10 full-at-7 once"))
        harness.until_in("running")
        harness.until_in("queue")
        run = root.run(only_ticket(root)[1])
        harness.tick(times=3)
        assert status(run)["waiting_for"].startswith("backoff: ")
        harness.tick(61.0)
        harness.until_in("done")


def test_a_full_disk_starts_nothing_and_says_so(root: DataRoot) -> None:
    with Harness(root) as harness:
        left = 10 * MIB
        harness.daemon._disk._measure = lambda folder: left
        drop(root, "a.yaml")
        harness.until_in("queue")
        harness.tick(times=3)
        run = root.run(only_ticket(root)[1])
        assert status(run)["waiting_for"] == "disk: 10 MiB of disk are free, at least 80 MiB are needed"
        left = 1000 * MIB
        harness.until_in("done")
