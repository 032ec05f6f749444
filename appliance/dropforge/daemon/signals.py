"""First SIGTERM or SIGINT: stop gracefully. Second: at once. A third finds the handlers that were there before."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_stop_signals(gracefully: Callable[[int], None], at_once: Callable[[], None]) -> Iterator[None]:
    """Install handlers while the block runs. The functions must only set flags; one gets the signal's number."""
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    received = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received == 1:
            gracefully(number)
        else:
            at_once()
            restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def status_after(number: int) -> int:
    """The exit status that says which signal ended the process, as a shell would."""
    return 128 + number
