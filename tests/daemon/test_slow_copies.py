"""Files that arrive slowly, by themselves or over a mount without events and with coarse times (tests 8, 11, 22)."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_harness import FAST, Harness, drop, places, spec_text
from dropforge.daemon.hints import Hints
from dropforge.daemon.queue import find
from dropforge.paths import DataRoot

REAL = replace(FAST, poll_seconds=1.0, settle_seconds=5.0)


def coarse(path: Path) -> None:
    """As a file system that knows times in steps of 2 s."""
    seconds = int(path.stat().st_mtime) // 2 * 2
    os.utime(path, (seconds, seconds))


@pytest.fixture(params=["events", "polling"])
def harness(root: DataRoot, request, monkeypatch: pytest.MonkeyPatch):
    if request.param == "polling":
        monkeypatch.setattr(Hints, "take_complete", lambda self, entries: frozenset())
        monkeypatch.setattr(Hints, "wait", lambda self, seconds: False)
    with Harness(root, options=REAL) as running:
        yield running


def test_a_copy_at_1_kilobyte_a_second_never_starts_early(harness: Harness) -> None:
    text = spec_text("slow steps-2") + "# " + "filler " * 3000 + "\n"
    path = harness.root.inbox / "slow.yaml"
    for end in range(1024, len(text) + 1024, 1024):
        path.write_text(text[:end])
        coarse(path)
        harness.tick(1.0)
        assert places(harness.root) == {}
    harness.tick(4.9)
    assert path.exists()
    harness.tick(1.0, times=2)
    harness.until_in("done")


@pytest.mark.parametrize("cut", [30, 75])
def test_a_copy_that_pauses_for_10_minutes_never_starts(harness: Harness, cut: int) -> None:
    """It lacks `export`, so it is no job; after a minute it is put aside with the reason, where it can be finished."""
    path = harness.root.inbox / "paused.yaml"
    path.write_text(spec_text("paused")[:cut])
    coarse(path)
    for _ in range(50):
        harness.tick(1.0)
        assert path.exists() and places(harness.root) == {}
    harness.tick(10.0, times=55)
    assert places(harness.root) == {}
    assert len(list(harness.root.rejected.glob("*/paused.yaml"))) == 1


def test_a_copy_that_starts_again_with_another_size(harness: Harness) -> None:
    path = drop(harness.root, "again.yaml", spec_text("first steps-2"))
    harness.tick(1.0, times=4)
    path.write_text(spec_text("second steps-2", extra="# longer than before\n"))
    coarse(path)
    harness.tick(1.0, times=4)
    assert places(harness.root) == {}, "the time begins again"
    harness.tick(1.0, times=3)
    harness.until_in("done")
    (job_id,) = places(harness.root)["done"]
    assert "-second-" in job_id


def test_the_same_size_in_the_same_two_seconds_is_still_read_as_it_is_at_the_end(harness: Harness) -> None:
    """Size and coarse time cannot tell; what is claimed is read again, so the job is what the file says at last."""
    path = drop(harness.root, "same.yaml", spec_text("aaaaa steps-2"))
    coarse(path)
    stamp = path.stat().st_mtime_ns
    harness.tick(1.0, times=4)
    with path.open("r+") as stream:
        stream.write(spec_text("bbbbb steps-2"))
    os.utime(path, ns=(stamp, stamp))
    harness.tick(1.0, times=3)
    harness.until_in("done")
    (job_id,) = places(harness.root)["done"]
    assert (harness.root.run(job_id).spec_original).read_text() == spec_text("bbbbb steps-2")


def test_names_that_differ_by_case_or_unicode_form_are_two_jobs(harness: Harness) -> None:
    (harness.root.control / "pause").touch()
    names = ["Job.yaml", "job.yaml", unicodedata.normalize("NFC", "jöb.yaml"), unicodedata.normalize("NFD", "jöb.yaml")]
    for number, name in enumerate(names):
        drop(harness.root, name, spec_text(f"number {number}"))
    harness.tick(1.0, times=8)
    assert len(places(harness.root)["queue"]) == 4
    files = [find(harness.root, job_id)[1].file for job_id in places(harness.root)["queue"]]
    assert sorted(files) == sorted(names)


def test_the_same_name_twice_is_two_jobs_and_the_same_content_twice_is_one(harness: Harness) -> None:
    (harness.root.control / "pause").touch()
    for text in (spec_text("one"), spec_text("two"), spec_text("two")):
        drop(harness.root, "job.yaml", text)
        harness.tick(1.0, times=8)
    assert len(places(harness.root)["queue"]) == 2
    (error,) = harness.root.rejected.glob("*/ERROR.txt")
    assert "job-duplicate" in error.read_text()
