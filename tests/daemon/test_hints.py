from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from daemon_harness import FAST, Harness, drop, places, spec_text
from dropforge.daemon.hints import Hints
from dropforge.paths import DataRoot


@pytest.fixture
def hints(root: DataRoot) -> Iterator[Hints]:
    with Hints(root) as watching:
        yield watching


def stage_and_rename(root: DataRoot, name: str = "a.yaml") -> None:
    (root.staging / name).write_text(spec_text())
    (root.staging / name).rename(root.inbox / name)


def test_a_rename_from_staging_is_told_once(root: DataRoot, hints: Hints) -> None:
    stage_and_rename(root)
    assert hints.take_complete(["a.yaml", "b.yaml"]) == {"a.yaml"}
    assert hints.take_complete(["a.yaml"]) == frozenset()


def test_it_is_kept_until_the_listing_shows_the_file(root: DataRoot, hints: Hints) -> None:
    stage_and_rename(root)
    assert hints.take_complete([]) == frozenset()
    assert hints.take_complete(["a.yaml"]) == {"a.yaml"}


def test_a_copy_and_a_rename_from_elsewhere_are_not_complete(root: DataRoot, hints: Hints) -> None:
    drop(root, "copied.yaml")
    (root.path / "moved.yaml").write_text("x")
    (root.path / "moved.yaml").rename(root.inbox / "moved.yaml")
    (root.staging / "gone.yaml").write_text("x")
    (root.staging / "gone.yaml").rename(root.path / "gone.yaml")
    assert hints.take_complete(["copied.yaml", "moved.yaml", "gone.yaml"]) == frozenset()


def test_writing_to_it_afterwards_takes_the_word_back(root: DataRoot, hints: Hints) -> None:
    stage_and_rename(root)
    with (root.inbox / "a.yaml").open("a") as stream:
        stream.write("more")
    assert hints.take_complete(["a.yaml"]) == frozenset()


def test_names_that_are_not_utf8(root: DataRoot, hints: Hints) -> None:
    name = os.fsdecode(b"bad\xff.yaml")
    stage_and_rename(root, name)
    assert hints.take_complete([name]) == {name}


@pytest.mark.parametrize("what", ["rename", "control", "wake"])
def test_what_ends_the_wait(root: DataRoot, hints: Hints, what: str) -> None:
    act = {"rename": lambda: stage_and_rename(root), "control": (root.control / "pause").touch, "wake": hints.wake}[
        what
    ]
    timer = threading.Timer(0.1, act)
    timer.start()
    began = time.monotonic()
    assert hints.wait(30.0) is (what != "wake")
    assert time.monotonic() - began < 10
    timer.join()


def test_a_growing_file_does_not_end_the_wait(root: DataRoot, hints: Hints) -> None:
    drop(root, "slow.yaml")
    began = time.monotonic()
    assert hints.wait(0.1) is False
    assert time.monotonic() - began >= 0.1


def test_without_inotify_it_only_sleeps(root: DataRoot) -> None:
    silent = Hints(root)  # not entered, so there is no descriptor
    stage_and_rename(root)
    silent.wake()
    assert silent.wait(0.01) is False
    assert silent.take_complete(["a.yaml"]) == frozenset()


def test_the_daemon_takes_a_renamed_file_without_settling(root: DataRoot) -> None:
    with Harness(root, options=replace(FAST, settle_seconds=3600.0)) as harness:
        drop(root, "copied.yaml", spec_text("copied"))
        stage_and_rename(root)
        harness.tick()
        assert [job_id.split("-")[1] for ids in places(root).values() for job_id in ids] == ["job"]
        assert (root.inbox / "copied.yaml").exists()
