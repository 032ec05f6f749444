"""Steps made ahead of time: a thread packs, collates and pins while the GPU works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from dropforge.packing.collate import MicroBatch, StepBatch, collate, collate_step
from dropforge.packing.plan import PackingPlan
from dropforge.packing.rows import TokenRows

AHEAD = 4
"""Steps that wait ready."""
POLL_SECONDS = 0.2


class Feeder:
    """Hands out the steps of epoch after epoch; any (epoch, step) may be asked for, the next one is there at once.

    Args:
        rows: the documents.
        plan: the order.
        pad: id of padding.
        pin: page-locked memory, for a GPU.
    """

    def __init__(self, rows: TokenRows, plan: PackingPlan, *, pad: int, pin: bool) -> None:
        self.rows, self.plan, self.pad, self.pin = rows, plan, pad, pin
        self.steps = plan.steps()
        self.epoch = 0
        """The epoch that is being trained; for whoever asks by step alone."""
        self._next: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=AHEAD)

    def step(self, epoch: int, step: int) -> StepBatch:
        """The step's micro-batches. Raises what the thread met, in the caller's thread."""
        if self._next != (epoch, step):
            self._start(epoch, step)
        made = self._ready.get()
        if isinstance(made, BaseException):
            self._next = None
            raise made
        self._next = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)
        return made

    def split(self, micro: MicroBatch) -> list[MicroBatch]:
        """Two micro-batches with the same documents, about as long as each other; one when there is one document."""
        documents = micro.bucket.documents
        if len(documents) < 2:
            return [micro]
        ends = np.cumsum(self.plan.lengths[documents])
        cut = int(np.clip(np.searchsorted(ends, ends[-1] / 2) + 1, 1, len(documents) - 1))
        items = int(micro.flat[-1])
        return [
            collate(self.rows, self.plan.bucket(part), pad=self.pad, pin=self.pin, items=items)
            for part in (documents[:cut], documents[cut:])
        ]

    def close(self) -> None:
        """Ends the thread; a later ``step`` starts a new one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._next = None, None

    def _start(self, epoch: int, step: int) -> None:
        self.close()
        self._stop, self._ready = threading.Event(), queue.Queue(maxsize=AHEAD)
        work = self._work(self._ready, self._stop, epoch, step)
        self._thread = threading.Thread(target=work, name="dropforge-packing", daemon=True)
        self._thread.start()
        self._next = (epoch, step)

    def _work(self, ready: queue.Queue[StepBatch | BaseException], stop: threading.Event, epoch: int, step: int
    ) -> Callable[[], None]:  # fmt: skip
        def put(made: StepBatch | BaseException) -> None:
            while not stop.is_set():
                try:
                    ready.put(made, timeout=POLL_SECONDS)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for made in self._steps(epoch, step):
                    put(made)
                    if stop.is_set():
                        return
            except Exception as error:  # noqa: BLE001  the edge of the thread: the trainer raises it
                put(error)

        return work

    def _steps(self, epoch: int, step: int) -> Iterator[StepBatch]:
        counted = self.plan.counted
        while True:
            for buckets in self.plan.epoch(epoch, steps=self.steps)[step:]:
                yield collate_step(self.rows, buckets, pad=self.pad, pin=self.pin, counted=counted)
            epoch, step = epoch + 1, 0
