"""Thousands of files at once: many specs per child, good ones first, nothing searched file by file."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_harness import FAKE_RUNNER, FAST, Harness, drop, places, spec_text, ticket
from dropforge import spec_check
from dropforge.daemon import loop, reception, spec_batch
from dropforge.daemon.loop import FAULT_SECONDS, PAGE_SECONDS, Daemon, DaemonOptions
from dropforge.daemon.query import list_jobs
from dropforge.daemon.queue import TicketBook, put
from dropforge.daemon.spec_batch import Child, SpecChecker, check_batch
from dropforge.daemon.watcher import Look, SettleTracker, look
from dropforge.errors import SpecError
from dropforge.paths import DataRoot
from dropforge.spec_check import CheckedSpec, check_in_child, to_yaml
from dropforge.states import State

GOOD = spec_text().encode()
BAD = spec_text(extra="nonsense: 1\n").encode()


def bad_text(number: int) -> str:
    return spec_text(f"bad-{number}", extra="nonsense: 1\n")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of specs given to each child for many."""
    asked: list[int] = []
    real = spec_batch._ask_child
    monkeypatch.setattr(
        spec_batch, "_ask_child", lambda specs, wall, child: asked.append(len(specs)) or real(specs, wall, child)
    )
    return asked


def test_one_child_gives_the_verdicts_that_single_children_give(children: list[int]) -> None:
    first, second, third = check_batch([(GOOD, "a.yaml"), (BAD, "b.yaml"), (b"{}", "c.json")])
    assert first == check_in_child(GOOD, filename="a.yaml")
    for verdict, (raw, name) in zip((second, third), ((BAD, "b.yaml"), (b"{}", "c.json")), strict=True):
        assert isinstance(verdict, SpecError)
        with pytest.raises(SpecError) as alone:
            check_in_child(raw, filename=name)
        assert verdict.problems == alone.value.problems
    assert children == [3]


KILLER = """
import os, signal, sys
from dropforge import spec_check
from dropforge.daemon import reception, spec_batch
real = spec_check.answer
def answer(raw, *, filename):
    if b"killer" in raw: os.kill(os.getpid(), signal.SIGSEGV)
    if b"sleeper" in raw: __import__("time").sleep(60)
    return real(raw, filename=filename)
spec_batch.answer = answer
spec_batch._child()
"""


@pytest.mark.parametrize("word", ["killer", "sleeper"])
def test_a_hostile_file_costs_no_other_its_verdict(monkeypatch: pytest.MonkeyPatch, children, word: str) -> None:
    monkeypatch.setattr(spec_batch, "_COMMAND", (sys.executable, "-P", "-c", KILLER))
    alone: list[str] = []

    def refuse(raw: bytes, *, filename: str) -> CheckedSpec:
        alone.append(filename)
        raise SpecError("hostile", code="spec-hostile")

    monkeypatch.setattr(spec_batch, "check_in_child", refuse)
    specs = [(GOOD, "1.yaml"), (f"# {word}\n".encode() + GOOD, "2.yaml"), (GOOD, "3.yaml"), (BAD, "4.yaml")]
    verdicts = check_batch(specs, wall_seconds=5.0)
    assert [isinstance(verdict, CheckedSpec) for verdict in verdicts] == [True, False, True, False]
    assert alone == ["2.yaml"]
    assert children == [4, 2]


def test_files_that_keep_their_child_busy_do_not_keep_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict or two of many, then time is over; the others are asked for in a later round."""
    monkeypatch.setattr(spec_batch, "_COMMAND", (sys.executable, "-P", "-c", KILLER))
    monkeypatch.setattr(spec_batch, "BATCH_SECONDS", 1.0)
    monkeypatch.setattr(spec_batch, "check_in_child", lambda raw, *, filename: pytest.fail("no time is left for it"))
    specs = [(GOOD, "1.yaml"), *((b"# sleeper\n" + GOOD, f"{number}.yaml") for number in range(2, 50))]
    began = time.monotonic()
    assert [type(verdict) for verdict in check_batch(specs, seconds=1.0)] == [CheckedSpec]
    assert time.monotonic() - began < 20


def test_it_is_said_for_how_many_there_was_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_batch, "check_batch", lambda specs, child: [SpecError("bad", code="spec-value")] * 2)
    checker = SpecChecker()
    assert checker.ahead([(BAD, "a.yaml"), (BAD, "b.yaml"), (BAD, "c.yaml"), (BAD, "d.yaml")]) == 2
    assert checker.ahead([(BAD, "c.yaml"), (BAD, "b.yaml"), (BAD, "d.yaml"), (BAD, "e.yaml")]) == 3


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """Every child that is started."""
    all_of_them: list[Child] = []

    class Noted(Child):
        def __init__(self) -> None:
            super().__init__()
            all_of_them.append(self)

    monkeypatch.setattr(spec_batch, "Child", Noted)
    return all_of_them


def test_the_child_starts_while_the_files_settle(root: DataRoot, started: list[Child]) -> None:
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=5.0, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: 0.0) as daemon:
        drop(root, "a.yaml", spec_text("a delay-1000"))
        daemon.tick(0.0)
        assert started == [], "one file is not worth it"
        drop(root, "b.yaml", spec_text("b delay-1000"))
        daemon.tick(1.0)
        assert len(started) == 1
        daemon.tick(6.0)
        assert len(places(root)["queue"]) == 1
        assert places(root)["running"]
        assert len(started) == 1, "it was the one that was asked"
        assert started[0]._process.returncode is not None


def test_a_child_that_is_not_needed_after_all_is_ended(root: DataRoot, started: list[Child]) -> None:
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=5.0, warm=False)
    paths = [drop(root, "a.yaml"), drop(root, "b.yaml")]
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: 0.0) as daemon:
        daemon.tick(0.0)
        for path in paths:
            path.unlink()
        daemon.tick(1.0)
        assert started[0]._process.returncode is not None
        drop(root, "a.yaml")
        drop(root, "b.yaml")
        daemon.tick(2.0)
        assert started[1]._process.returncode is None
    assert started[1]._process.returncode is not None


def test_a_child_ends_when_its_daemon_is_gone() -> None:
    with Child() as child:
        os.dup2(child._answers.fileno(), child._go)  # the only end of the pipe that could be written to is closed
        assert child._process.wait(30) == 0


def test_a_child_that_died_while_it_waited_costs_no_verdict(children: list[int]) -> None:
    checker = SpecChecker()
    checker.get_ready()
    checker._child._process.kill()
    checker._child._process.wait()
    assert checker.ahead([(GOOD, "a.yaml"), (BAD, "b.yaml"), (GOOD, "c.yaml")]) == 3
    assert checker.check(GOOD, filename="c.yaml").spec.name == "job"
    assert children == [3, 2]


def test_what_was_not_checked_in_time_is_checked_in_the_next_round(
    root: DataRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def three(specs: list[tuple[bytes, str]], wall: float, child: Child | None) -> list[dict]:
        asked.append(len(specs))
        now[0] += 9.0
        return [spec_check.answer(raw, filename=name) for raw, name in specs[:3]]

    now = [0.0]
    monkeypatch.setattr(spec_batch, "_ask_child", three)
    monkeypatch.setattr(spec_batch.time, "monotonic", lambda: now[0])
    for number in range(9):
        drop(root, f"{number}.yaml", spec_text(f"job-{number} delay-1000"))
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: now[0]) as daemon:
        for _ in range(4):
            now[0] += 0.1
            daemon.tick(now[0])
    assert asked == [9, 6, 3]


def test_a_machine_that_is_too_busy_rejects_nothing(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that got no CPU time says nothing about its file: it is tried again, and STATUS.md says why."""
    monkeypatch.setattr(spec_check, "WALL_SECONDS", 0.01)
    monkeypatch.setattr(spec_batch, "_ask_child", lambda specs, wall, child: [])
    drop(root, "job.yaml")
    drop(root, "other.yaml", spec_text("other"))
    with Harness(root, check=check_in_child) as harness:
        harness.tick(0.1, times=5)
        harness.tick(PAGE_SECONDS)
        assert not any(root.rejected.iterdir())
        assert "too busy" in root.status_page.read_text()
        monkeypatch.setattr(spec_check, "WALL_SECONDS", 60.0)
        harness.tick(FAULT_SECONDS + 1, times=2)
        assert len(places(root).get("queue", []) + places(root).get("running", [])) == 2


def test_verdicts_made_ahead_are_used_and_others_are_made_when_asked(children: list[int]) -> None:
    checker = SpecChecker()
    checker.ahead([(GOOD, "a.yaml"), (BAD, "b.yaml")])
    assert checker.check(GOOD, filename="a.yaml").spec.name == "job"
    with pytest.raises(SpecError):
        checker.check(BAD, filename="b.yaml")
    changed = GOOD.replace(b"name: job", b"name: other")  # the file was written again in between
    assert checker.check(changed, filename="a.yaml").spec.name == "other"
    checker.ahead([(GOOD, "a.yaml"), (BAD, "b.yaml")])
    assert children == [2], "known verdicts are not made again"


def test_the_good_one_among_many_bad_ones_starts_before_the_bad_ones_are_dealt_with(
    root: DataRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "FILES_PER_ROUND", 20)
    for number in range(60):
        drop(root, f"{number:03}.yaml", bad_text(number))
    drop(root, "zz-good.yaml", spec_text("good"))
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, warm=False)
    now = 0.0
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: now) as daemon:
        for _ in range(2):
            now += 0.1
            daemon.tick(now)
        assert places(root).get("running"), "found in the first look that could take anything"
        assert len(list(root.rejected.iterdir())) == 20, "rejecting came second, and only so many"
        while len(list(root.rejected.iterdir())) < 60:
            now += 0.1
            daemon.tick(now)
        assert list(root.inbox.glob("*.yaml")) == []


def test_the_first_job_starts_before_the_rest_of_the_flood_is_taken(root: DataRoot) -> None:
    """And the first child's files are taken whole, so that the most urgent of a few is still the first to start."""
    for number in range(200):
        extra = "resources: {priority: 90}\n" if number == 30 else ""
        drop(root, f"{number:03}.yaml", spec_text(f"good-{number} delay-1000", extra=extra))
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: 0.0) as daemon:
        daemon.tick(0.0)
        daemon.tick(0.1)
        found = places(root)
        assert (len(found["queue"]), len(found["running"])) == (49, 1)
        assert "good-30" in found["running"][0]
        daemon.tick(0.2)
        assert len(places(root)["queue"]) > 150


def test_a_file_is_taken_when_it_has_settled_not_at_the_next_poll(root: DataRoot) -> None:
    drop(root, "a.yaml")
    began = time.monotonic()
    options = DaemonOptions(poll_seconds=60.0, settle_seconds=0.5, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER) as daemon:
        daemon.run(until=lambda: bool(places(root)) or time.monotonic() - began > 50)
    assert time.monotonic() - began < 30


def test_a_flood_is_not_listed_again_for_every_few_files(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look takes 0.3 s here, and each round one file."""
    now, looks = [0.0], []

    def slow_look(data_root: DataRoot) -> Look:
        looks.append(now[0])
        now[0] += 0.3
        return look(data_root)

    monkeypatch.setattr(reception, "look", slow_look)
    monkeypatch.setattr(reception, "FILES_PER_ROUND", 1)
    monkeypatch.setattr(spec_batch, "_ask_child", lambda specs, wall, child: [
        spec_check.answer(raw, filename=name) for raw, name in specs
    ])  # fmt: skip
    for number in range(30):
        drop(root, f"{number:03}.yaml", spec_text(f"good-{number}"))
    options = DaemonOptions(poll_seconds=0.1, settle_seconds=0.05, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: now[0]) as daemon:
        for _ in range(30):
            now[0] += 0.2
            daemon.tick(now[0])
        assert sum(map(len, places(root).values())) >= 25
    assert len(looks) <= 5, looks


def test_the_next_spec_of_a_flood_is_written_out_cheaply() -> None:
    """Every default is written as before; writing all of them anew would be most of what a flood costs."""
    to_yaml(check_in_child(GOOD, filename="a.yaml").resolved)
    before = spec_check._emitted.cache_info().misses
    other = spec_text("one more", extra="train: {learning_rate: 1.25e-5}\n")
    assert "learning_rate: 1.25e-05" in to_yaml(spec_check.check(other.encode(), filename="a.yaml").resolved)
    assert spec_check._emitted.cache_info().misses - before == 2


def test_on_a_slow_machine_a_child_is_not_paid_for_one_file(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child takes longer than a look may last; what it found is used all the same."""
    now, asked = [0.0], []

    def slow(specs: list[tuple[bytes, str]], wall: float, child: Child | None) -> list[dict]:
        asked.append(len(specs))
        now[0] += 8.0
        return [spec_check.answer(raw, filename=name) for raw, name in specs]

    monkeypatch.setattr(spec_batch, "_ask_child", slow)
    for number in range(140):
        drop(root, f"{number:03}.yaml", bad_text(number))
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: now[0]) as daemon:
        for _ in range(12):
            now[0] += 0.1
            daemon.tick(now[0])
        assert asked == [50, 50, 40]
        assert len(list(root.rejected.iterdir())) > 100


def test_a_round_ends_although_all_files_are_bad(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child for every few seconds of it would hold up the heartbeat, which is stale after 15 s."""
    now = [0.0]

    def slow(specs: list[tuple[bytes, str]], wall: float, child: Child | None) -> list[dict]:
        now[0] += 1.5
        return [spec_check.answer(raw, filename=name) for raw, name in specs]

    monkeypatch.setattr(spec_batch, "_ask_child", slow)
    monkeypatch.setattr(reception, "CHECKED_AT_ONCE", 50)
    for number in range(600):
        drop(root, f"{number:03}.yaml", bad_text(number))
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: now[0]) as daemon:
        daemon.tick(0.0)
        now[0] = began = 1.0
        daemon.tick(1.0)
        assert now[0] - began < 5


def test_a_long_queue_is_not_sorted_again_while_no_slot_is_free(
    root: DataRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        drop(root, f"{number}.yaml", spec_text(f"job-{number} steps-1 delay-300"))
    sorted_at: list[int] = []
    real = loop.schedule
    monkeypatch.setattr(
        loop, "schedule", lambda queued, **facts: sorted_at.append(len(queued)) or real(queued, **facts)
    )
    with Harness(root, options=replace(FAST, poll_seconds=1000.0)) as harness:
        harness.tick(1000.0, times=2)
        assert places(root).keys() == {"queue", "running"}
        before = len(sorted_at)
        harness.tick(0.001, times=5)
        assert len(sorted_at) == before
        harness.until(lambda: len(places(root).get("done", [])) == 3)  # a slot that becomes free is filled at once


def test_large_specs_are_not_all_held_in_memory_at_once(root: DataRoot, children: list[int], monkeypatch) -> None:
    monkeypatch.setattr(reception, "CHECKED_BYTES", 1000)
    for number in range(12):
        drop(root, f"{number:03}.yaml", (bad_text(number) + "# " + "x" * 300)[:300])
    options = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, warm=False)
    with Daemon(root, options=options, runner_command=FAKE_RUNNER, clock=lambda: 0.0) as daemon:
        daemon.tick(0.0)
        daemon.tick(0.1)
    assert children == [3, 3, 3, 3]


def test_a_look_at_10_000_files_is_fast(root: DataRoot) -> None:
    for number in range(10_000):
        (root.inbox / f"{number}.yaml").write_bytes(GOOD)
    tracker = SettleTracker(root, settle_seconds=5)
    times = []
    for now in range(3):
        began = time.process_time()
        ready = tracker.update(look(root), now=now * 6.0)
        times.append(time.process_time() - began)
    assert len(ready) == 10_000
    assert min(times) < 0.2, times


def test_equal_content_is_found_as_long_as_one_such_job_lives(root: DataRoot) -> None:
    book = TicketBook(root)
    for number in (1, 2):
        book.add("queue", ticket(number, digest="same"))
        put(root, "queue", ticket(number, digest="same"))
    book.move(ticket(2).id, source="queue", state=State.SUCCEEDED)
    assert book.with_digest("same") == ticket(1, digest="same")
    book.move(ticket(1).id, source="queue", state=State.SUCCEEDED)
    assert book.with_digest("same") is None


def test_the_status_page_reads_only_the_latest_rejections(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    from dropforge.daemon import rejection

    for number in range(1, 40):
        folder = root.rejected / f"{number:06}-x-00000000"
        folder.mkdir()
        (folder / "x.yaml").write_text("x")
        (folder / "error.json").write_text(f'{{"id": "{folder.name}", "file": "x", "problems": []}}')
    read: list[Path] = []
    real = rejection.read_json
    monkeypatch.setattr(rejection, "read_json", lambda path: read.append(path) or real(path))
    assert [job.seq for job in list_jobs(root, ended=20)] == list(range(20, 40))
    assert len(read) == 20


@pytest.mark.slow
@pytest.mark.parametrize("place", ["0.yaml", "zz.yaml"])
def test_one_good_file_among_10_000_starts_within_a_minute(root: DataRoot, place: str, record_property) -> None:
    for number in range(1, 10_000):
        drop(root, f"{number}.yaml", bad_text(number))
    drop(root, place, spec_text("good"))
    began, before = time.monotonic(), os.times()
    with Daemon(root, options=DaemonOptions(warm=False), runner_command=FAKE_RUNNER) as daemon:
        daemon.run(until=lambda: bool(places(root).keys() & {"running", "done"}))
    took, cpu, busy = time.monotonic() - began, sum(os.times()[:4]) - sum(before[:4]), os.getloadavg()[0]
    record_property("measured", f"{place}: started after {took:.0f} s ({cpu:.0f} s of CPU time, {busy:.0f} others wanted the "
                                f"{os.cpu_count()} cores)")  # fmt: skip
    assert cpu < 60
    assert took < 60
