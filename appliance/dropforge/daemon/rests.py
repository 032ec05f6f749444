"""Jobs that may not start yet although a slot is free: after a fault that may pass, or until the disk has room.

Kept in memory, on the monotonic clock: a new daemon tries at once.
"""

from __future__ import annotations

from dropforge.daemon import attempts
from dropforge.daemon.disk import MARGIN_BYTES, MIB, DiskWatch, needed_to_go_on
from dropforge.daemon.queue import Ticket
from dropforge.daemon.scheduler import Waiting
from dropforge.daemon.verdict import RETRY_DELAY_SECONDS, Verdict
from dropforge.daemon.worker import Ended
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from dropforge.states import State

PLENTY_BYTES = 1 << 30
"""A disk with so much room that is called full has another limit."""


class Rests:
    """Remembers who rests until when, or until how much disk is free."""

    def __init__(self, root: DataRoot, disk: DiskWatch) -> None:
        self._root = root
        self._disk = disk
        self._until: dict[str, float] = {}
        self._bytes: dict[str, int] = {}

    def begin(self, ended: Ended, verdict: Verdict, *, now: float) -> None:
        """After an attempt: does its job have to rest before the next?"""
        job_id = ended.ticket.id
        if verdict.delay:
            self._until[job_id] = now + verdict.delay
        if verdict.state is State.INTERRUPTED and verdict.reason is Reason.DISK:
            run = self._root.run(job_id)
            made_room = ended.end.freed >= MARGIN_BYTES and _times_full(self._root, ended.ticket, ended) == 1
            if not made_room:  # trying the same again with the same space would fail the same
                if ended.room < PLENTY_BYTES:
                    self._bytes[job_id] = needed_to_go_on(run, free=ended.room)
                else:  # bytes were not what was missing, but a quota or file names: only trying tells
                    self._until[job_id] = now + RETRY_DELAY_SECONDS

    def waiting(self, now: float) -> dict[str, Waiting]:
        """Who rests now, by id, with the numbers."""
        self._until = {job_id: until for job_id, until in self._until.items() if now < until}
        self._bytes = {job_id: needed for job_id, needed in self._bytes.items() if self._disk.free < needed}
        resting = {
            job_id: Waiting(kind="backoff", text=f"tried again in {until - now:.0f} s after a fault that may pass")
            for job_id, until in self._until.items()
        }
        free = self._disk.free // MIB
        for job_id, needed in self._bytes.items():
            text = f"the disk was full; goes on when {needed // MIB} MiB are free, {free} MiB are free now"
            resting[job_id] = Waiting(kind="disk", text=text)
        return resting


def _times_full(root: DataRoot, ticket: Ticket, ended: Ended) -> int:
    """How often the disk was full for this job since its newest checkpoint."""
    ends = attempts.ends(root.run(ticket.id), after=ticket.retried_after)
    return sum(end.no_space and end.progress.checkpoint >= ended.end.progress.checkpoint for end in ends)
