from __future__ import annotations

import os

from daemon_harness import drop
from dropforge.daemon.submit import submit
from dropforge.daemon.watcher import SettleTracker, fingerprint, look
from dropforge.paths import DataRoot


def names(tracker: SettleTracker, root: DataRoot, now: float) -> list[str]:
    return [ready.name for ready in tracker.update(look(root), now=now)]


def test_a_file_is_ready_after_two_looks_far_enough_apart(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    drop(root, "a.yaml")
    assert names(tracker, root, 100.0) == []
    assert names(tracker, root, 104.9) == []
    assert names(tracker, root, 105.0) == ["a.yaml"]


def test_it_says_when_the_next_one_will_have_settled(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    drop(root, "a.yaml")
    names(tracker, root, 100.0)
    drop(root, "b.yaml")
    names(tracker, root, 103.0)
    assert tracker.settles_at == 105.0
    assert names(tracker, root, 105.0) == ["a.yaml"]
    assert tracker.settles_at == 108.0
    names(tracker, root, 108.0)
    assert tracker.settles_at == float("inf")


def test_one_look_is_never_enough_even_without_settling_time(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=0)
    drop(root, "a.yaml")
    assert names(tracker, root, 100.0) == []
    assert names(tracker, root, 100.1) == ["a.yaml"]


def test_every_change_starts_the_clock_again(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    path = drop(root, "a.yaml", "version: 1\n")
    for now in (0.0, 4.0, 8.0, 12.0):  # a slow copy: it grows before each look
        with path.open("a") as stream:
            stream.write("x: 1\n")
        assert names(tracker, root, now) == []
    assert names(tracker, root, 16.9) == []
    assert names(tracker, root, 17.0) == ["a.yaml"]


def test_same_size_rewritten_counts_as_a_change(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    path = drop(root, "a.yaml", "aaaa")
    names(tracker, root, 0.0)
    os.utime(path, ns=(0, 12345))
    assert names(tracker, root, 5.0) == []
    path.unlink()
    drop(root, "a.yaml", "aaaa")
    assert names(tracker, root, 10.0) == []


def test_modification_times_are_never_compared_with_a_clock(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    for name, year in (("past.yaml", 0), ("future.yaml", 4_070_908_800)):
        os.utime(drop(root, name), (year, year))
    names(tracker, root, 0.0)
    assert sorted(names(tracker, root, 5.0)) == ["future.yaml", "past.yaml"]


def test_a_file_renamed_from_staging_is_complete_at_once(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    staged = root.staging / "a.yaml"
    staged.write_text("version: 1\n")
    assert names(tracker, root, 0.0) == []
    staged.rename(root.inbox / "a.yaml")
    ready = tracker.update(look(root), now=0.5)
    assert [(item.name, item.complete) for item in ready] == [("a.yaml", True)]


def test_a_staged_file_that_grew_before_its_rename_settles(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    staged = root.staging / "a.yaml"
    staged.write_text("version: 1\n")
    names(tracker, root, 0.0)
    staged.write_text("version: 1\nname: more\n")
    staged.rename(root.inbox / "a.yaml")
    assert names(tracker, root, 0.5) == []
    assert names(tracker, root, 5.5) == ["a.yaml"]


def test_a_submitted_file_is_complete_even_if_the_daemon_starts_later(root: DataRoot) -> None:
    spec = root.path / "mine.yaml"
    spec.write_text("version: 1\n")
    target = submit(root, spec)
    tracker = SettleTracker(root, settle_seconds=5)
    assert names(tracker, root, 0.0) == [target.name]


def test_a_submitted_file_that_is_changed_afterwards_settles(root: DataRoot) -> None:
    spec = root.path / "mine.yaml"
    spec.write_text("version: 1\n")
    target = submit(root, spec)
    target.write_text("version: 1\nname: edited\n")
    tracker = SettleTracker(root, settle_seconds=5)
    assert names(tracker, root, 0.0) == []


def test_a_job_folder_settles_with_everything_in_it(root: DataRoot) -> None:
    tracker = SettleTracker(root, settle_seconds=5)
    folder = root.inbox / "a.job"
    (folder / "deep").mkdir(parents=True)
    (folder / "job.yaml").write_text("version: 1\n")
    names(tracker, root, 0.0)
    data = folder / "deep" / "rows.jsonl"
    data.write_text("{}\n")
    assert names(tracker, root, 5.0) == []
    with data.open("a") as stream:
        stream.write("{}\n")
    assert names(tracker, root, 10.0) == []
    assert names(tracker, root, 15.0) == ["a.job"]


def test_hidden_and_temporary_files_are_not_seen_and_not_removed(root: DataRoot) -> None:
    for name in (".hidden.yaml", "half.yaml.part"):
        drop(root, name)
    assert look(root).entries == {}
    assert (root.inbox / ".hidden.yaml").exists()


def test_a_fingerprint_survives_a_rename_and_sees_every_change(root: DataRoot) -> None:
    path = drop(root, "a.yaml", "one")
    before = fingerprint(path)
    moved = path.rename(root.inbox / "b.yaml")
    assert fingerprint(moved) == before
    moved.write_text("two")
    assert fingerprint(moved) != before
    assert fingerprint(path) is None


def test_names_that_are_not_utf8_are_seen(root: DataRoot) -> None:
    (root.inbox / os.fsdecode(b"bad\xff.yaml")).write_text("x")
    tracker = SettleTracker(root, settle_seconds=0)
    names(tracker, root, 0.0)
    ready = tracker.update(look(root), now=1.0)
    assert len(ready) == 1
    assert ready[0].fingerprint.token
