"""What the daemon costs: idle, and under 20,000 files at once. Slow, and meant for a quiet machine: `make test-faults`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemon_harness import places, spec_text, wait_until
from dropforge.daemon.control import Switch, set_switch
from dropforge.daemon.singleton import daemon_is_alive
from dropforge.daemon.watcher import SettleTracker, look
from dropforge.paths import DataRoot

pytestmark = pytest.mark.slow
MIB = 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Resident bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


def cpu_seconds(pid: int, *, children: bool = False) -> float:
    """Of the process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if children else 13])) / TICKS


def disk_under(path: Path) -> str:
    """Type of the file system: on a RAM disk an fsync costs nothing, and the number must say so."""
    return subprocess.run(
        ["stat", "--file-system", "--format", "%T", path], capture_output=True, text=True, check=True
    ).stdout.strip()


def watch(root: DataRoot, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dropforge", "watch"], stderr=subprocess.DEVNULL,
        env={**os.environ, "DROPFORGE_DATA": str(root.path), "DROPFORGE_DEVICE": "cpu", **environment},
    )  # fmt: skip


def test_an_idle_daemon_costs_nothing(root: DataRoot, record_property) -> None:
    """The daemon as users run it; the warm runner beside it is a process of its own, which only waits."""
    daemon = watch(root)
    try:
        wait_until(lambda: daemon_is_alive(root))
        time.sleep(30)  # the warm runner has imported everything
        before, began = cpu_seconds(daemon.pid), time.monotonic()
        time.sleep(60)
        share = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - began)
        resident = memory(daemon.pid)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
    record_property("measured", f"{100 * share:.2f} % of a core, {resident / MIB:.0f} MiB")
    assert share < 0.01
    assert resident < 80 * MIB


GOOD, BAD = 10_000, 10_000
SETTLE_SECONDS, FIRST_SECONDS = 5, 10
PATIENCE = 3600


def test_20_000_files_at_once(root: DataRoot, record_property) -> None:
    """10,000 good and 10,000 bad ones: all accounted for, the first job at once, memory flat, a look below 0.2 s."""
    for number in range(BAD):
        (root.inbox / f"a-bad-{number:05}.yaml").write_text(spec_text(f"bad-{number}", extra="nonsense: 1\n"))
    for number in range(GOOD):
        (root.inbox / f"good-{number:05}.yaml").write_text(spec_text(f"good-{number} steps-1 delay-1"))
    tracker, looks = SettleTracker(root, settle_seconds=SETTLE_SECONDS), []
    for now in range(3):
        started = time.process_time()
        tracker.update(look(root), now=now * 6.0)
        looks.append(time.process_time() - started)
    began = time.monotonic()
    daemon = watch(root, DROPFORGE_POLL_SECONDS="1")
    try:
        wait_until(lambda: places_of_first(root), seconds=120)
        first, first_cpu = time.monotonic() - began, cpu_seconds(daemon.pid, children=True)
        busy = os.getloadavg()[0]
        set_switch(root, Switch.PAUSE, on=True)
        resident = [memory(daemon.pid)]
        while any(root.inbox.glob("*.yaml")):
            assert time.monotonic() - began < PATIENCE, "it did not end"
            time.sleep(2)
            resident.append(memory(daemon.pid))
        peak = max(resident)
        took, cpu = time.monotonic() - began, cpu_seconds(daemon.pid, children=True)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(120)
    tickets = sum(len(ids) for ids in places(root).values())
    rejected = len(list(root.rejected.iterdir()))
    record_property(
        "measured",
        f"first start after {first:.1f} s ({SETTLE_SECONDS} s of them settling, {first_cpu:.1f} s of CPU time; {busy:.0f} "
        f"others wanted the {os.cpu_count()} cores), all 20,000 taken after {took:.0f} s ({cpu:.0f} s of CPU time, on "
        f"{disk_under(root.path)}), daemon {resident[0] / MIB:.0f} MiB at the first start and {peak / MIB:.0f} MiB at most, "
        f"a look at 20,000 files {1000 * min(looks):.0f} ms of CPU time",
    )
    assert (tickets, rejected) == (GOOD, BAD)
    assert json.loads(root.queue_json.read_text())["queued_more"] >= 0
    assert min(looks) < 0.2, looks
    assert peak < 300 * MIB
    assert SETTLE_SECONDS + first_cpu < FIRST_SECONDS
    assert first < FIRST_SECONDS


def places_of_first(root: DataRoot) -> bool:
    return any(next((root.path / folder).glob("*.json"), None) for folder in ("running", "done"))
