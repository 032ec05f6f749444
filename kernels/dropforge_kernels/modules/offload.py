"""Layer inputs in host memory between forward and backward, moved on side streams while the layers compute.

Forward: ``put`` copies a tensor to pinned memory on its own stream; the tensor stays alive until ``depth`` more were
put, whose layer's work hides the copy, and its memory is given back in the order of the computing stream, so a host
that queues far ahead of the GPU does not pile tensors up. Backward, in reverse order: ``get`` starts the copies of the
``depth`` tensors before the one it returns, so that one layer's backward hides them; the last ones put are still on
the GPU and need no copy. ``depth`` is the number of tensors that a layer puts; at most so many are on either way,
beside those in use.

Pinned memory comes in slabs of powers of two, because the host allocator rounds up to those; a tensor may lie across
slabs. The method is activation offloading with prefetch (Rhu et al. 2016, arXiv 1602.08124), for layer inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

SMALLEST_SLAB = 16 << 20


@dataclass(frozen=True, eq=False)
class Ticket:
    """What ``put`` gives for ``get``: where one tensor lies."""

    number: int
    generation: int
    start: int
    """Byte in the slabs, taken as one after the other."""
    like: torch.Tensor
    """Shape, dtype; an empty tensor on the meta device."""
    device: torch.device


class _Here(NamedTuple):
    """A tensor on the GPU on its way to or from the host."""

    ticket: Ticket
    tensor: torch.Tensor
    copied: torch.cuda.Event | None
    """After the copy; None on the CPU."""


class HostStore:
    """Tensors of one forward. Not thread-safe; tensors are fetched in the reverse order of their storing.

    capacity: bytes that will be needed (of all tensors of a forward), allocated at the first ``put`` or by ``reserve``;
    more is added when that turns out too little. depth: tensors that one layer puts. CPU tensors are copied to ordinary
    memory.
    """

    def __init__(self, *, capacity: int = 0, depth: int = 1) -> None:
        self._wanted = capacity
        self._depth = depth
        self._slabs: list[torch.Tensor] = []
        self._generation = 0
        self._tickets: list[Ticket] = []
        self._used = 0
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._here: dict[int, _Here] = {}
        """By ticket number: put last and perhaps not copied yet, or on the way back."""

    @property
    def capacity(self) -> int:
        """Bytes of the slabs."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def used(self) -> int:
        """Bytes put since the last ``clear``."""
        return self._used

    def reserve(self, nbytes: int, device: torch.device) -> None:
        """Make the slabs large enough for ``nbytes``, pinned when ``device`` is a GPU. Touches all of it: slow once."""
        for size in slab_sizes(nbytes - self.capacity):
            self._slabs.append(torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda"))

    def put(self, x: torch.Tensor) -> Ticket:
        """Start the copy of ``x`` (any shape, contiguous) to the host. The caller may drop ``x`` but not change it.

        Raises ValueError for a tensor that is not contiguous.
        """
        if not x.is_contiguous():
            raise ValueError(f"HostStore.put: x must be contiguous; received strides {x.stride()} for {tuple(x.shape)}")
        x = x.detach()
        if self._used + x.nbytes > self.capacity:
            self.reserve(max(self._wanted, self._used + x.nbytes), x.device)
        ticket = Ticket(len(self._tickets), self._generation, self._used, torch.empty_like(x, device="meta"), x.device)
        self._tickets.append(ticket)
        self._used += x.nbytes
        self._drop(number for number in list(self._here) if number <= ticket.number - self._depth)
        self._here[ticket.number] = _Here(ticket, x, self._copy(ticket, x, to_host=True))
        return ticket

    def get(self, ticket: Ticket) -> torch.Tensor:
        """The tensor's values, bit for bit; starts bringing those before it. A ticket is good for one ``get``.

        Raises RuntimeError for a ticket of an earlier forward (``clear`` was called since).
        """
        if ticket.generation != self._generation:
            raise RuntimeError(
                "HostStore.get: this tensor was given up when the next forward began; run each backward before the "
                "next forward of the same model"
            )
        self._drop(number for number in list(self._here) if number > ticket.number)
        found = self._here.pop(ticket.number, None) or self._fetch(ticket)
        for number in range(ticket.number - 1, max(-1, ticket.number - 1 - self._depth), -1):
            if number not in self._here:
                self._here[number] = self._fetch(self._tickets[number])
        _wait(found)
        return found.tensor

    def clear(self) -> None:
        """Forget every tensor; the slabs stay. Tickets handed out so far are void."""
        self._drop(list(self._here))
        self._tickets = []
        self._used = 0
        self._generation += 1

    def _fetch(self, ticket: Ticket) -> _Here:
        x = torch.empty_like(ticket.like, device=ticket.device)
        return _Here(ticket, x, self._copy(ticket, x, to_host=False))

    def _copy(self, ticket: Ticket, x: torch.Tensor, *, to_host: bool) -> torch.cuda.Event | None:
        """Queue the copy behind what the current stream holds so far; the event after it, None on the CPU."""
        if ticket.device.type != "cuda":
            self._move(ticket, x, to_host=to_host)
            return None
        stream = self._stream(ticket.device, to_host=to_host)
        stream.wait_stream(torch.cuda.current_stream(ticket.device))
        with torch.cuda.stream(stream):
            self._move(ticket, x, to_host=to_host)
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def _stream(self, device: torch.device, *, to_host: bool) -> torch.cuda.Stream:
        if self._streams is None:
            self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        return self._streams[0 if to_host else 1]

    def _move(self, ticket: Ticket, x: torch.Tensor, *, to_host: bool) -> None:
        flat = x.view(-1).view(torch.uint8)
        done = 0
        for piece in self._pieces(ticket.start, flat.numel()):
            there = flat[done : done + piece.numel()]
            if to_host:
                piece.copy_(there, non_blocking=True)
            else:
                there.copy_(piece, non_blocking=True)
            done += piece.numel()

    def _pieces(self, start: int, nbytes: int) -> Iterator[torch.Tensor]:
        """The parts of the slabs that hold bytes start : start + nbytes."""
        base = 0
        for slab in self._slabs:
            low, high = max(start, base), min(start + nbytes, base + slab.numel())
            if low < high:
                yield slab[low - base : high - base]
            base += slab.numel()

    def _drop(self, numbers: Iterable[int]) -> None:
        """Before a tensor's last reference goes: whoever gets its memory next must come after the copy."""
        for number in numbers:
            _wait(self._here.pop(number))


def _wait(entry: _Here) -> None:
    """The current stream goes on after the copy."""
    if entry.copied is not None:
        torch.cuda.current_stream(entry.ticket.device).wait_event(entry.copied)


def slab_sizes(nbytes: int) -> list[int]:
    """Powers of two, largest first, that add up to ``nbytes`` rounded up to 16 MiB; empty for nothing."""
    if nbytes <= 0:
        return []
    units = -(-nbytes // SMALLEST_SLAB)
    return [SMALLEST_SLAB << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1]
