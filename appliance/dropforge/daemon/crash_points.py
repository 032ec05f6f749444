"""Every place where the daemon may die between two durable steps. Tests kill it at each one and start it again.

The daemon calls `reached(label)` there; the default does nothing. Injected through the constructor, so that no
environment variable or hidden option can reach it in production.
"""

from __future__ import annotations

from collections.abc import Callable

CrashHook = Callable[[str], None]

CRASH_POINTS = (
    "intake.sequence-taken",
    "intake.run-folder-made",
    "intake.claimed",
    "intake.ticket-written",
    "intake.accepted",
    "reject.folder-made",
    "reject.moved",
    "start.attempt-made",
    "start.ticket-moved",
    "start.spawned",
    "end.attempt-closed",
    "end.status-written",
    "end.ticket-moved",
    "control.done",
)


def ignore(label: str) -> None:
    """The hook of a real daemon."""
