"""Small jobs that may pass a large one that waits for GPUs, because they are sure not to delay it.

The method is EASY backfilling (Lifka, "The ANL/IBM SP scheduling system", 1995): the job at the head gets a reservation
at the time when enough slots will be free. Another may start now if its time limit ends before that, or if it takes
slots that the head does not need then. A job without `resources.time_limit` can only do the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dropforge.daemon.query import read_status
from dropforge.daemon.queue import Ticket
from dropforge.daemon.worker import Running
from dropforge.paths import DataRoot


@dataclass
class Reservation:
    """What the head will need, and when. `spare` shrinks as jobs are let past."""

    seconds: float
    """From now until enough slots are free for the head."""
    spare: int
    """Slots free then beyond what the head takes."""

    def lets_pass(self, ticket: Ticket, *, wanted: int) -> bool:
        if ticket.time_limit is not None and ticket.time_limit <= self.seconds:
            return True
        if wanted <= self.spare:
            self.spare -= wanted
            return True
        return False


def reserve(wanted: int, *, free: int, busy_for: Sequence[float | None]) -> Reservation | None:
    """The reservation of a head that wants more slots than are free.

    Args:
        busy_for: seconds until each busy slot is free; None where nobody knows. Then nothing can be promised, and None
            is returned.
    """
    if any(seconds is None for seconds in busy_for):
        return None
    ends = sorted(seconds for seconds in busy_for if seconds is not None)
    start = ends[wanted - free - 1]
    return Reservation(seconds=start, spare=free + sum(end <= start for end in ends) - wanted)


def slots_busy_for(root: DataRoot, running: Sequence[Running]) -> Mapping[str, float | None]:
    """Slot to the seconds until its job ends, by the job's own estimate (which leaves the exports out: too early)."""
    ends: dict[str, float | None] = {}
    for job in running:
        eta: Any = read_status(root.run(job.ticket.id)).get("eta_seconds")
        ends |= dict.fromkeys(job.slots, float(eta) if type(eta) in (int, float) else None)
    return ends
