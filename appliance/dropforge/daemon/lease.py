"""`runs/<id>/lease.json`: which process runs the job, and its heartbeat.

Recovery trusts the pid in it only when start time and boot id match as well.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from dropforge.daemon.process import ProcessId
from dropforge.events import utc_now
from dropforge.files import read_json, write_json
from dropforge.paths import RunFolder

BEAT_SECONDS = 5.0


class Lease:
    """Held by a runner: writes lease.json at once and then every BEAT_SECONDS from a thread."""

    def __init__(self, run: RunFolder, *, attempt: int, clock: Callable[[], float] = time.monotonic) -> None:
        identity = ProcessId.of(os.getpid())
        assert identity is not None, "this process lives"
        self.run = run
        self._fields: dict[str, Any] = {
            "schema": 1, "process": identity.as_json(), "host": os.uname().nodename, "attempt": attempt,
        }  # fmt: skip
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        write_json(self.run.lease, {**self._fields, "beat": round(self._clock(), 3), "updated": utc_now()})

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.beat()
            except OSError:
                # A full disk must not end the job; the lease is only read after a death, and identity is in it already.
                continue


def holder(run: RunFolder) -> ProcessId | None:
    """The process named by the lease, dead or alive; None without a readable lease."""
    try:
        return ProcessId.from_json(read_json(run.lease)["process"])
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
