"""Which queued job starts next, and what each of the others waits for. Pure: lists in, decisions out.

Highest priority first, one point more for every half hour of waiting, then order of acceptance. A slot is one GPU; a
machine without GPUs has one slot, its CPU. The job at the head is overtaken only by jobs that cannot delay it
(backfill.py), so that large jobs do not starve; one that can never fit steps aside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from dropforge.daemon.backfill import Reservation, reserve
from dropforge.daemon.queue import Ticket

CPU_SLOT = "cpu"
AGEING_SECONDS = 1800.0
_NO_AGES: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why a queued job does not run."""

    kind: str
    """pause, memory, disk, backoff, gpu, slot or priority."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Schedule:
    starts: tuple[tuple[Ticket, tuple[str, ...]], ...]
    """Tickets to start now, each with the slots it gets."""
    waiting: tuple[tuple[Ticket, Waiting], ...]
    """Everybody else, in the order in which they will start."""


class Ages:
    """How many points of priority each queued job has gained by waiting, counted while this daemon runs."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def points(self, queued: Sequence[Ticket], *, now: float) -> Mapping[str, int]:
        self._since = {ticket.id: self._since.get(ticket.id, now) for ticket in queued}
        return {job_id: int((now - since) // AGEING_SECONDS) for job_id, since in self._since.items()}


def in_order(queued: Sequence[Ticket], *, ages: Mapping[str, int] = _NO_AGES) -> list[Ticket]:
    return sorted(queued, key=lambda ticket: (-ticket.priority - ages.get(ticket.id, 0), ticket.seq))


_NOBODY: Mapping[str, Waiting] = MappingProxyType({})
_NOT_HELD: Mapping[str, str] = MappingProxyType({})
_NO_ENDS: Mapping[str, float | None] = MappingProxyType({})


def schedule(
    queued: Sequence[Ticket], *, gpus: Sequence[str], busy: Collection[str], held: Mapping[str, str] = _NOT_HELD,
    blocked: Waiting | None = None, resting: Mapping[str, Waiting] = _NOBODY,
    ages: Mapping[str, int] = _NO_AGES, busy_for: Mapping[str, float | None] = _NO_ENDS,
) -> Schedule:  # fmt: skip
    """Decide.

    Args:
        gpus: the machine's GPUs; empty means that jobs run on the CPU.
        busy: slots taken by running jobs.
        held: GPUs whose memory other programs hold, with how much.
        blocked: why nothing may start (pause, drain, no memory), None otherwise.
        resting: why single jobs (by id) may not start yet; they step aside.
        ages: points of priority gained by waiting, by id.
        busy_for: seconds until a busy slot is free; absent or None where nobody knows.
    """
    slots = tuple(gpus) or (CPU_SLOT,)
    free = [slot for slot in slots if slot not in busy and slot not in held]
    starts: list[tuple[Ticket, tuple[str, ...]]] = []
    waiting: list[tuple[Ticket, Waiting]] = []
    behind: Waiting | None = None
    reservation: Reservation | None = None
    for ticket in in_order(queued, ages=ages):
        wanted = len(slots) if ticket.gpus == "all" else int(ticket.gpus)
        if blocked is not None:
            waiting.append((ticket, blocked))
        elif ticket.id in resting:
            waiting.append((ticket, resting[ticket.id]))
        elif wanted > len(slots):
            has = f"{len(gpus)} GPU{'s' if len(gpus) != 1 else ''}"
            waiting.append((ticket, Waiting(kind="gpu", text=f"asks for {wanted} GPUs, this machine has {has}")))
        elif behind is None and wanted > len(free):
            behind = Waiting(kind="priority", text=f"{ticket.id} and others stand before it")
            taken = [busy_for.get(slot) for slot in slots if slot not in free]
            reservation = reserve(wanted, free=len(free), busy_for=taken)
            waiting.append((ticket, _for_slots(wanted, len(free), gpus, held)))
        elif behind is not None and not _passes(ticket, wanted, len(free), reservation):
            waiting.append((ticket, behind))
        else:
            starts.append((ticket, tuple(free[:wanted])))
            free = free[wanted:]
    return Schedule(starts=tuple(starts), waiting=tuple(waiting))


def _passes(ticket: Ticket, wanted: int, free: int, reservation: Reservation | None) -> bool:
    return wanted <= free and reservation is not None and reservation.lets_pass(ticket, wanted=wanted)


def _for_slots(wanted: int, free: int, gpus: Sequence[str], held: Mapping[str, str]) -> Waiting:
    if not gpus:
        return Waiting(kind="slot", text="another job runs; this machine does one at a time")
    text = f"needs {wanted} free GPU{'s' if wanted != 1 else ''}, {free} of {len(gpus)} free"
    if not held:
        return Waiting(kind="slot", text=text)
    by_others = ", ".join(f"{slot} ({memory})" for slot, memory in held.items())
    return Waiting(kind="gpu", text=f"{text}; other programs hold the memory of {by_others}")
