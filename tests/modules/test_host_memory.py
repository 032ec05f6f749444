"""What a container leaves counts, not what the machine has."""

from __future__ import annotations

from pathlib import Path

from dropforge_kernels.modules.host_memory import host_available

GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 300000000 kB\nMemAvailable: 209715200 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_a_limit_the_machine_counts(tmp_path):
    assert host_available(machine(tmp_path, {})) == 200 * GIB
    group = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}
    assert host_available(machine(tmp_path, group)) == 200 * GIB


def test_a_limit_less_what_is_used_but_for_file_caches(tmp_path):
    group = {
        "sys/fs/cgroup/memory.max": str(128 * GIB),
        "sys/fs/cgroup/memory.current": str(30 * GIB),
        "sys/fs/cgroup/memory.stat": f"anon {14 * GIB}\ninactive_file {10 * GIB}\nactive_file {6 * GIB}\n",
    }
    assert host_available(machine(tmp_path, group)) == 114 * GIB


def test_the_old_control_groups(tmp_path):
    group = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(64 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(10 * GIB),
    }
    assert host_available(machine(tmp_path, group)) == 54 * GIB


def test_a_system_that_does_not_say_gives_nothing(tmp_path):
    assert host_available(tmp_path) == 0


def test_this_machine():
    assert host_available() > 64 << 20
