"""One daemon per data root: a lock the kernel drops when the process dies, and a heartbeat that people can read.

On a network file system a lock may hold on one machine only, so there the other daemon's heartbeat is watched as well.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from typing import Any

from dropforge.daemon.layout import unusable
from dropforge.daemon.mounts import is_on_network
from dropforge.daemon.process import ProcessId
from dropforge.errors import EnvironmentFault
from dropforge.events import utc_now
from dropforge.files import read_json, write_json
from dropforge.paths import DataRoot

HEARTBEAT_SECONDS = 5.0
LOCK_TRIES = 5


class Singleton:
    """Holds state/daemon.lock while entered. Raises EnvironmentFault (daemon-running) when another daemon holds it."""

    def __init__(
        self, root: DataRoot, *, on_network: Callable[[DataRoot], bool] = lambda root: is_on_network(root.path),
        wait: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._root = root
        self._on_network = on_network
        self._wait = wait
        self._fd: int | None = None

    def __enter__(self) -> Singleton:
        try:
            fd = os.open(self._root.state / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unusable(self._root, error) from error
        try:
            _lock(fd)
            if self._on_network(self._root) and self._somebody_beats():
                raise BlockingIOError
        except BlockingIOError:
            os.close(fd)
            raise self._refusal() from None
        self._fd = fd
        return self

    def _somebody_beats(self) -> bool:
        """Watch the heartbeat for as long as a living daemon may be silent; clocks of machines are not compared."""
        before = read_heartbeat(self._root)
        if before.get("state") not in (None, "stopped"):
            for _ in range(int(3 * HEARTBEAT_SECONDS)):
                self._wait(1.0)
                if read_heartbeat(self._root) != before:
                    return True
        write_heartbeat(self._root, state="recovering", problems=[], running=[], queued=0)
        mine = read_heartbeat(self._root)
        self._wait(1.0)  # another one that starts at this moment writes as well; the later one wins
        return read_heartbeat(self._root) != mine

    def __exit__(self, *exc: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _refusal(self) -> EnvironmentFault:
        beat = read_heartbeat(self._root)
        process = beat.get("process")
        pid = process.get("pid", "unknown") if isinstance(process, dict) else "unknown"
        return EnvironmentFault(
            "another daemon serves this data root", code="daemon-running", where=str(self._root.path),
            why=f"process {pid} on {beat.get('host', 'an unknown machine')} holds state/daemon.lock",
            fix="stop it first, or use another DROPFORGE_DATA",
        )  # fmt: skip


def _lock(fd: int) -> None:
    """Raises BlockingIOError when a daemon holds it; one who only asks (`daemon_is_alive`) holds it for an instant."""
    for _ in range(LOCK_TRIES - 1):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_heartbeat(root: DataRoot, *, state: str, problems: list[str], running: list[str], queued: int) -> None:
    """state/daemon.json: health checks and `status` read it. Stale after three times HEARTBEAT_SECONDS."""
    identity = ProcessId.of(os.getpid())
    write_json(root.state / "daemon.json", {
        "schema": 1, "process": identity.as_json() if identity else None, "host": os.uname().nodename, "state": state,
        "problems": problems, "running": running, "queued": queued, "updated": utc_now(),
    })  # fmt: skip


def read_heartbeat(root: DataRoot) -> dict[str, Any]:
    """The last heartbeat; empty when there is none that can be read."""
    try:
        value = read_json(root.state / "daemon.json")
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def daemon_is_alive(root: DataRoot) -> bool:
    """True when a process of this machine holds the lock. Needs no right to write."""
    try:
        fd = os.open(root.state / "daemon.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # never served, or not ours to read
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(fd)
    return False
