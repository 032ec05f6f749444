"""How often the kernel has killed a process for lack of memory: the only trustworthy sign of that death.

A container engine's own flag is not reliable when a child, not the first process, is killed.
"""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def kill_count(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> int | None:
    """The oom_kill counter of this process's control group (version 2, then 1), else of the machine.

    None when the kernel tells nothing.
    """
    group = _own_groups(proc)
    sources = [
        cgroup / group.get("", "").lstrip("/") / "memory.events",
        cgroup / "memory.events",
        cgroup / "memory" / group.get("memory", "").lstrip("/") / "memory.oom_control",
        cgroup / "memory" / "memory.oom_control",
        proc / "vmstat",
    ]
    for source in sources:
        count = _counter(source)
        if count is not None:
            return count
    return None


def _own_groups(proc: Path) -> dict[str, str]:
    """Controller name ("" for version 2) to path, from /proc/self/cgroup."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    groups = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _counter(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdigit():
            return int(value)
    return None
