from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from daemon_harness import wait_until
from dropforge.daemon.out_of_memory import kill_count
from dropforge.daemon.process import ProcessId, kill_family, session_members

FAMILY = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"


def test_identity_is_not_fooled_by_a_reused_pid_or_another_boot() -> None:
    own = ProcessId.of(os.getpid())
    assert own is not None
    assert own.alive()
    assert not replace(own, start_time=own.start_time + 1).alive()
    assert not replace(own, boot_id="another boot").alive()
    assert ProcessId.from_json(own.as_json()) == own


def test_identity_of_the_dead_and_of_nonsense() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: ProcessId.of(child.pid) is None, what="a zombie counts as dead")
    child.wait()
    for value in (None, {}, {"pid": "x"}, [1], {"pid": 1, "start_time": None, "boot_id": ""}):
        assert ProcessId.from_json(value) is None


def test_the_whole_session_is_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", FAMILY], start_new_session=True)
    try:
        wait_until(lambda: len(session_members(child.pid)) == 2)
        assert kill_family(child.pid) == []
        assert session_members(child.pid) == []
    finally:
        child.kill()
        assert child.wait() == -signal.SIGKILL


def counters(tmp_path: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path / "proc", tmp_path / "cgroup"


def test_the_counter_of_the_own_control_group_wins(tmp_path: Path) -> None:
    proc, cgroup = counters(tmp_path, {
        "proc/self/cgroup": "0::/job\n", "cgroup/job/memory.events": "low 0\noom 3\noom_kill 2\n",
        "cgroup/memory.events": "oom_kill 9\n", "proc/vmstat": "pgfault 1\noom_kill 7\n",
    })  # fmt: skip
    assert kill_count(proc, cgroup) == 2


def test_version_1_and_the_machine_as_a_last_resort(tmp_path: Path) -> None:
    proc, cgroup = counters(tmp_path, {
        "proc/self/cgroup": "4:memory:/job\n0::/\n", "cgroup/memory/job/memory.oom_control": "under_oom 0\noom_kill 4\n",
        "proc/vmstat": "oom_kill 7\n",
    })  # fmt: skip
    assert kill_count(proc, cgroup) == 4
    (cgroup / "memory/job/memory.oom_control").unlink()
    assert kill_count(proc, cgroup) == 7
    (proc / "vmstat").unlink()
    assert kill_count(proc, cgroup) is None
