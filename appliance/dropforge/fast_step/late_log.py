"""Loss and gradient norm read back without waiting: copied while the next step runs, logged when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoggedStep:
    """What a logging step leaves behind."""

    step: int
    epoch: float
    steps: int
    """Optimizer steps that the loss is the sum of."""
    learning_rate: float
    values: torch.Tensor
    """(2,) fp32 on the host: loss, gradient norm."""
    arrived: torch.cuda.Event | None


class LateLog:
    """A queue of logging steps in order."""

    def __init__(self) -> None:
        self._queue: deque[LoggedStep] = deque()

    def put(
        self, loss: torch.Tensor, norm: torch.Tensor, *, step: int, epoch: float, steps: int, learning_rate: float
    ) -> None:
        """Starts the copy of two device values. They may change afterwards."""
        pair = torch.stack((loss.detach().float(), norm.detach().float()))
        arrived = None
        if pair.is_cuda:
            values = torch.empty(2, dtype=torch.float32, pin_memory=True)
            values.copy_(pair, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            values = pair
        self._queue.append(LoggedStep(step, epoch, steps, learning_rate, values, arrived))

    def take(self, *, wait: bool) -> Iterator[LoggedStep]:
        """Those that have arrived, oldest first; all of them with ``wait``."""
        while self._queue:
            first = self._queue[0]
            if first.arrived is not None and not first.arrived.query():
                if not wait:
                    return
                first.arrived.synchronize()
            yield self._queue.popleft()
