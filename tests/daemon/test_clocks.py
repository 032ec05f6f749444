"""Clocks jump, time zones change, files come from the future: nothing is decided by the wall clock (test 12)."""

from __future__ import annotations

import ast
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from daemon_harness import Harness, drop, only_ticket, places, spec_text, status
from dropforge.daemon import control
from dropforge.daemon.query import list_jobs
from dropforge.paths import DataRoot

APPLIANCE = Path(__file__).resolve().parents[2] / "appliance" / "dropforge"
FUTURE, PAST = 4_070_908_800, 86_400
"""2099 and 1970 as modification times."""


class JumpingClock(datetime):
    """A day forward at every second look, a day back at the others."""

    looks = 0

    @classmethod
    def now(cls, tz=None):
        cls.looks += 1
        return datetime(2026, 11, 21, 12, tzinfo=UTC) + timedelta(days=1 if cls.looks % 2 else -1)


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropforge.events.datetime", JumpingClock)
    monkeypatch.setattr(time, "time", lambda: 1_795_000_000 + (86_400 if time.monotonic_ns() % 2 else -86_400))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_order_and_settling_do_not_change(root: DataRoot, jumping: None) -> None:
    (root.control / "pause").touch()
    with Harness(root) as harness:
        for name, stamp in (("first", FUTURE), ("second", PAST), ("third", FUTURE)):
            os.utime(drop(root, f"{name}.yaml", spec_text(f"{name} steps-2")), (stamp, stamp))
            harness.tick(0.02)
            assert not [job for job in list_jobs(root) if name in job.id], "not before it has settled"
            harness.tick(0.1)
        names = [job.name.split()[0] for job in list_jobs(root)]
        assert names == ["first", "second", "third"]
        control.set_switch(root, control.Switch.PAUSE, on=False)
        harness.until_in("done", count=3)
        ended = [places(root)["done"].index(job_id) for job_id in sorted(places(root)["done"])]
        assert ended == [0, 1, 2]


def test_a_file_whose_time_is_set_back_settles_again(root: DataRoot, jumping: None) -> None:
    with Harness(root) as harness:
        path = drop(root, "job.yaml")
        harness.tick(0.04)
        os.utime(path, (PAST, PAST))
        harness.tick(0.04)
        assert path.exists()
        harness.tick(0.06, times=2)
        assert not path.exists()


def test_time_limits_do_not_change(root: DataRoot, jumping: None) -> None:
    drop(root, "job.yaml", spec_text("steps-100000 delay-20", extra="resources: {time_limit: 60s}\n"))
    with Harness(root) as harness:
        harness.until_in("running")
        harness.tick(30.0)
        assert list(places(root)) == ["running"], "a jump of a day is no use of time"
        harness.tick(31.0)
        harness.until_in("failed")
    assert status(root.run(only_ticket(root)[1]))["reason"] == "timeout"


WALL = {("time", "time"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("time", "localtime")}
FOR_PEOPLE = {"events.py", "liveness.py"}
"""utc_now, which is only shown; and how `status` sees a daemon on another machine, which no daemon asks."""


def test_the_daemon_never_asks_the_wall_clock() -> None:
    files = [*(APPLIANCE / "daemon").glob("*.py"), *APPLIANCE.glob("*.py")]
    asked = {
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) in WALL
    }  # fmt: skip
    assert asked <= FOR_PEOPLE, asked
