"""Specs for the fake job, and daemons in this process or in a child that can be killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dropforge.daemon.crash_points import ignore
from dropforge.daemon.lease import holder
from dropforge.daemon.loop import Daemon, DaemonOptions
from dropforge.daemon.queue import Ticket, all_tickets
from dropforge.files import read_json
from dropforge.paths import DataRoot, RunFolder
from dropforge.spec_check import check

HERE = Path(__file__).parent
FAKE_RUNNER = (sys.executable, str(HERE / "fake_runner.py"))
FAST = DaemonOptions(poll_seconds=0.02, settle_seconds=0.05, grace_seconds=5.0, warm=False)


def spec_text(name: str = "job", *, extra: str = "") -> str:
    return f"version: 1\nname: {name}\nmodel: builtin:tiny-llama\ndata: rows.jsonl\n{extra}export: [adapter]\n"


def ticket(number: int = 1, **changes) -> Ticket:
    fields = {"id": f"{number:06d}-job-00000000", "name": "job", "slug": "job", "seq": number, "file": "job.yaml",
              "digest": f"digest-{number}"}  # fmt: skip
    return Ticket(**{**fields, **changes})


def trains(run: RunFolder) -> bool:
    """At least one step of the latest attempt is done (metrics are written at every step)."""
    return run.metrics.exists()


def status(run: RunFolder) -> dict:
    return read_json(run.status) if run.status.exists() else {}


def expected_sum(steps: int) -> str:
    value = 0
    for step in range(1, steps + 1):
        value = (value * 31 + step) % 1_000_003
    return str(value)


def runner_pid(run: RunFolder) -> int:
    held = holder(run)
    assert held is not None
    return held.pid


def wait_until(condition: Callable[[], object], *, seconds: float = 20.0, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.01)


def places(root: DataRoot) -> dict[str, list[str]]:
    """Folder to ids of the tickets in it; empty folders left out."""
    found: dict[str, list[str]] = {}
    for folder, ticket in all_tickets(root):
        found.setdefault(folder, []).append(ticket.id)
    return found


def only_ticket(root: DataRoot) -> tuple[str, str]:
    """Folder and id of the only ticket there is."""
    found = [(folder, ticket.id) for folder, ticket in all_tickets(root)]
    assert len(found) == 1, found
    return found[0]


def drop(root: DataRoot, name: str, text: str | None = None) -> Path:
    """As a user would with cp: straight into the inbox."""
    path = root.inbox / name
    path.write_text(spec_text() if text is None else text)
    return path


class Harness:
    """A daemon in this process, ticked by the test: time is a number, settling needs no sleep."""

    def __init__(self, root: DataRoot, *, options: DaemonOptions = FAST, crash=ignore, check=check) -> None:
        self.now = 1000.0
        self.root = root
        self.daemon = Daemon(root, options=options, check=check, runner_command=FAKE_RUNNER, crash=crash,
                             clock=lambda: self.now)  # fmt: skip

    def __enter__(self) -> Harness:
        self.daemon.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self.daemon.__exit__(*exc)

    def tick(self, seconds: float = 0.1, times: int = 1) -> None:
        """Let `seconds` pass, `times` times, with one round after each."""
        for _ in range(times):
            self.now += seconds
            self.daemon.tick(self.now)

    def until(self, condition: Callable[[], object], *, seconds: float = 20.0) -> None:
        """Tick with real waiting (for child processes) until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s; tickets: {places(self.root)}"
            self.tick(0.03)
            time.sleep(0.01)

    def until_in(self, folder: str, *, count: int = 1) -> None:
        self.until(lambda: len(places(self.root).get(folder, [])) >= count)


class DaemonProcess:
    """A daemon in a child process that can be killed, optionally dying at a crash point."""

    def __init__(self, root: DataRoot, *, die_at: str = "", nth: int = 1, journal: Path | None = None) -> None:
        command = [
            sys.executable,
            str(HERE / "daemon_process.py"),
            str(root.path),
            die_at,
            str(nth),
            str(journal or ""),
        ]
        self.child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, *exc) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.communicate(timeout=20)

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(timeout=20)

    def terminate(self) -> None:
        self.child.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 20.0) -> int:
        return self.child.wait(timeout=seconds)
