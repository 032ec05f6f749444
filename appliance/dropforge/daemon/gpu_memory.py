"""GPUs whose memory somebody else holds: a notebook, another program, or a job that ended and has not given it back.

Starting there would end in an out-of-memory crash, so the slot counts as busy until the memory is free, and the waiting
job says how much is held.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

log = logging.getLogger("dropforge.daemon")

MIB = 1 << 20
HELD_SHARE = 0.10
HELD_BYTES = 1 << 30
"""Less than the larger of these two is not a program with a model: drivers and displays hold some."""
LOOK_SECONDS = 5.0
PATIENCE_SECONDS = 2.0
"""So long the loop waits for the driver's answer; a later one counts at the next look."""
_TIMEOUT_SECONDS = 20.0
_COMMAND = ("nvidia-smi", "--query-gpu=uuid,memory.used,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """What the driver says about one GPU, in bytes."""

    used: int
    total: int

    @property
    def held(self) -> bool:
        return self.used >= max(HELD_SHARE * self.total, HELD_BYTES)

    @property
    def text(self) -> str:
        return f"{self.used // MIB} of {self.total // MIB} MiB"


Read = Callable[[], Mapping[str, GpuMemory]]
"""By UUID; GPUs of which the driver does not tell are left out."""


class GpuWatch:
    """Asks the driver at most every LOOK_SECONDS and only when it matters. A driver that hangs holds up nobody."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._next_look = float("-inf")
        self._memory: Mapping[str, GpuMemory] = {}
        self._asking: threading.Thread | None = None

    def held(self, free: Collection[str], *, now: float) -> dict[str, GpuMemory]:
        """Which of the slots that none of our jobs uses are held by somebody else, as far as is known."""
        if free and now >= self._next_look and (self._asking is None or not self._asking.is_alive()):
            self._next_look = now + LOOK_SECONDS
            self._asking = threading.Thread(target=self._ask, name="gpu-memory", daemon=True)
            self._asking.start()
            self._asking.join(PATIENCE_SECONDS)
        return {slot: self._memory[slot] for slot in free if slot in self._memory and self._memory[slot].held}

    def forget(self) -> None:
        """Look again at once: a job of ours has ended."""
        self._next_look = float("-inf")

    def _ask(self) -> None:
        try:
            self._memory = self._read()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            self._memory = {}
            log.warning("the GPUs' memory is not known: %s", error, extra={"action": "gpu-memory"})


def read_driver() -> dict[str, GpuMemory]:
    """From nvidia-smi. Where GPU and CPU share their memory it names no numbers, and the memory watch guards instead.

    Raises OSError, subprocess.SubprocessError, ValueError when it does not answer or says something else.
    """
    done = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return {
        uuid: GpuMemory(used=int(used) * MIB, total=int(total) * MIB)
        for uuid, used, total in rows
        if used.isdigit() and total.isdigit()
    }
