"""Which queued job starts next, and what each of the others waits for. Pure: lists in, decisions out.

Highest priority first, then order of acceptance. A slot is one GPU; a machine without GPUs has one slot, its CPU. The
job at the head is never overtaken by a smaller one, so that large jobs do not starve; one that cannot fit steps aside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from dropforge.daemon.queue import Ticket

CPU_SLOT = "cpu"


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


def in_order(queued: Sequence[Ticket]) -> list[Ticket]:
    return sorted(queued, key=lambda ticket: (-ticket.priority, ticket.seq))


_NOBODY: Mapping[str, Waiting] = MappingProxyType({})


def schedule(
    queued: Sequence[Ticket], *, gpus: Sequence[str], busy: Collection[str], 
    blocked: Waiting | None = None, resting: Mapping[str, Waiting] = _NOBODY,
) -> Schedule:  # fmt: skip
    """Decide.

    Args:
        gpus: the machine's GPUs; empty means that jobs run on the CPU.
        busy: slots taken by running jobs.
        blocked: why nothing may start (pause, drain, no memory), None otherwise.
        resting: why single jobs (by id) may not start yet; they step aside.
    """
    slots = tuple(gpus) or (CPU_SLOT,)
    free = [slot for slot in slots if slot not in busy]
    starts: list[tuple[Ticket, tuple[str, ...]]] = []
    waiting: list[tuple[Ticket, Waiting]] = []
    head: Ticket | None = None
    for ticket in in_order(queued):
        wanted = len(slots) if ticket.gpus == "all" else int(ticket.gpus)
        if blocked is not None:
            waiting.append((ticket, blocked))
        elif ticket.id in resting:
            waiting.append((ticket, resting[ticket.id]))
        elif wanted > len(slots):
            has = f"{len(gpus)} GPU{'s' if len(gpus) != 1 else ''}"
            waiting.append((ticket, Waiting(kind="gpu", text=f"asks for {wanted} GPUs, this machine has {has}")))
        elif head is not None:
            waiting.append((ticket, Waiting(kind="priority", text=f"{head.id} and others stand before it")))
        elif wanted > len(free):
            head = ticket
            waiting.append((ticket, Waiting(kind="slot", text=_slot_text(wanted, len(free), gpus))))
        else:
            starts.append((ticket, tuple(free[:wanted])))
            free = free[wanted:]
    return Schedule(starts=tuple(starts), waiting=tuple(waiting))


def _slot_text(wanted: int, free: int, gpus: Sequence[str]) -> str:
    if not gpus:
        return "another job runs; this machine does one at a time"
    return f"needs {wanted} free GPU{'s' if wanted != 1 else ''}, {free} of {len(gpus)} free"
