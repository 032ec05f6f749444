"""Is anybody at work? What `status` must know besides the files, which a kill or a power cut leaves as they were.

A daemon lives when its lock is held or, where locks do not reach (another machine, a container of Docker Desktop), when
its heartbeat is fresh. The same for a job and its lease.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dropforge.daemon.process import ProcessId
from dropforge.daemon.singleton import HEARTBEAT_SECONDS, daemon_is_alive, read_heartbeat
from dropforge.files import read_json
from dropforge.paths import DataRoot, RunFolder

FRESH_SECONDS = 3 * HEARTBEAT_SECONDS
NOT_RUNNING = (
    "Dropforge is NOT running on this folder. Nothing is lost, and nothing moves until it is started: "
    "`dropforge watch`, or `docker start` of its container."
)
_TEXTS = {
    "recovering": "Dropforge is starting and puts everything in order.",
    "paused": "Dropforge is paused: running jobs go on, nothing new starts until control/pause is removed.",
    "draining": "Dropforge drains: it ends when nothing runs any more, nothing new starts.",
    "stopping": "Dropforge is stopping: running jobs save a checkpoint.",
}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Whether a daemon serves a data root, and how."""

    alive: bool
    text: str
    """One sentence for people."""
    problems: tuple[str, ...] = ()
    """What a living daemon complains of."""


def serving(root: DataRoot) -> Serving:
    beat = read_heartbeat(root)
    if not (daemon_is_alive(root) or (beat.get("state") != "stopped" and _is_fresh(beat))):
        return Serving(alive=False, text=NOT_RUNNING)
    problems = beat.get("problems")
    return Serving(
        alive=True, text=_TEXTS.get(str(beat.get("state")), "Dropforge is running."),
        problems=tuple(str(problem) for problem in problems) if isinstance(problems, list) else (),
    )  # fmt: skip


def runs_now(run: RunFolder) -> bool:
    """True when the process that the job's lease names is alive."""
    try:
        lease = read_json(run.lease)
    except (OSError, ValueError):
        return False
    return isinstance(lease, dict) and _is_fresh(lease)


def _is_fresh(beat: dict[str, Any]) -> bool:
    """Of a process here: whether it lives. Of one elsewhere: whether it wrote within the last seconds."""
    if beat.get("host") == os.uname().nodename:
        identity = ProcessId.from_json(beat.get("process"))
        return identity is not None and identity.alive()
    try:
        written = datetime.fromisoformat(str(beat.get("updated")))
    except ValueError:
        return False
    age = (datetime.now(UTC) - written).total_seconds() if written.tzinfo else FRESH_SECONDS + 1
    return abs(age) <= FRESH_SECONDS
