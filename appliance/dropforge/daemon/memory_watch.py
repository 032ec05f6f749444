"""Ends a job before the machine runs out of memory: a host that swaps or freezes takes every job with it.

On machines where GPU and CPU share their memory nothing else guards it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dropforge.daemon.process import session_members

MIB = 1 << 20
KILL_AFTER_SECONDS = 10.0
"""Patience with a job that was asked to save and stop while memory stays below the floor."""
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = _CGROUP) -> int | None:
    """Memory that can still be had: the machine's MemAvailable, or less under a container's limit (cgroup version 2).

    None when the kernel does not tell.
    """
    machine = _field(proc / "meminfo", "MemAvailable:")
    if machine is None:
        return None
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None:
        return machine * 1024
    reclaimable = _field(cgroup / "memory.stat", "inactive_file") or 0  # page cache counts as used but can be dropped
    return min(machine * 1024, max(limit - used + reclaimable, 0))


def session_bytes(leader: int, proc: Path = Path("/proc")) -> int:
    """Resident memory of all processes in the session that `leader` began."""
    kibibytes = (_field(proc / str(pid) / "status", "VmRSS:") or 0 for pid in {leader, *session_members(leader)})
    return 1024 * sum(kibibytes)


class MemoryWatch:
    """Says what to do about the largest job while memory is below `floor` bytes (0: never anything)."""

    def __init__(self, *, floor: int, available: Callable[[], int | None] = available_bytes) -> None:
        self._floor = floor
        self._available = available
        self._below_since: float | None = None
        self.available: int | None = None

    @property
    def low(self) -> bool:
        return self._below_since is not None

    @property
    def text(self) -> str:
        return f"{(self.available or 0) // MIB} MiB of memory are left, the floor is {self._floor // MIB} MiB"

    def look(self, *, now: float) -> None:
        self.available = self._available() if self._floor else None
        if self.available is None or self.available >= self._floor:
            self._below_since = None
        elif self._below_since is None:
            self._below_since = now

    def must_kill(self, *, now: float) -> bool:
        """True when asking did not help in time, or when there is no time to ask."""
        if self._below_since is None or self.available is None:
            return False
        return now - self._below_since >= KILL_AFTER_SECONDS or self.available < self._floor // 4


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    rows = (line.split() for line in lines)
    return next((int(row[1]) for row in rows if len(row) > 1 and row[0] == name and row[1].isdigit()), None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
