"""Processes as the daemon must see them: identity that survives pid reuse, sessions, and the end of all of one.

Read from /proc (see proc(5)): a pid alone says nothing after a reboot or a reuse, so an identity is pid, start time and
boot id together.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """One process, never mistaken for another with the same pid."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of /proc/PID/stat."""
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """None when no such process lives (a zombie counts as dead)."""
        stat = _stat(pid)
        return None if stat is None else cls(pid=pid, start_time=stat.start_time, boot_id=boot_id())

    @classmethod
    def from_json(cls, value: Any) -> ProcessId | None:
        """None when `value` does not hold an identity (a lease that somebody edited)."""
        try:
            return cls(pid=int(value["pid"]), start_time=int(value["start_time"]), boot_id=str(value["boot_id"]))
        except (KeyError, TypeError, ValueError):
            return None

    def alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    session: int
    start_time: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text.rpartition(")")[2].split()  # the command name before it may hold spaces and parentheses
    stat = _Stat(state=fields[0], parent=int(fields[1]), session=int(fields[3]), start_time=int(fields[19]))
    return None if stat.state in "ZX" else stat


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def _all() -> Iterator[tuple[int, _Stat]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            stat = _stat(int(entry.name))
            if stat is not None:
                yield int(entry.name), stat


def session_members(session: int) -> list[int]:
    """Living processes of a session."""
    return [pid for pid, stat in _all() if stat.session == session]


def descendants(pid: int) -> list[int]:
    """Living children, grandchildren and so on, also those that left the session."""
    children: dict[int, list[int]] = {}
    for child, stat in _all():
        children.setdefault(stat.parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that is gone already is fine."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def kill_family(
    leader: int, *, seconds: float = 5.0, spare: Collection[int] = (), wait: Callable[[float], None] = time.sleep
) -> list[int]:
    """Kill everything in the session that `leader` leads and everything below it. Returns who survived `seconds`.

    `spare` names processes to leave alone.

    The caller must not have reaped `leader` yet (or must know by its ProcessId that it still lives): then the kernel
    cannot have given its number to a stranger.
    """
    left: set[int] = set()
    for _ in range(max(1, int(seconds / 0.05))):
        left = set(session_members(leader)) | set(descendants(leader))
        left -= {os.getpid(), *spare}
        if not left:
            return []
        for pid in left:
            kill(pid)
        wait(0.05)
    return sorted(left)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel to send `number` to this process when its parent dies."""
    _prctl(_PR_SET_PDEATHSIG, number)


def become_subreaper() -> None:
    """Make orphaned grandchildren children of this process, so that it can find and end them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
