"""A daemon that finds its data root served waits for its turn: it starts nothing, writes nothing, and says so."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from dropforge.daemon.loop import Daemon
from dropforge.daemon.signals import on_stop_signals, status_after
from dropforge.errors import EnvironmentFault

log = logging.getLogger("dropforge.daemon")

LOOK_SECONDS = 5.0


def serve(make: Callable[[], Daemon], *, look_seconds: float = LOOK_SECONDS) -> int:
    """Serve a data root until told to stop, standing by while another daemon serves it.

    Args:
        make: a fresh daemon for every look.

    Returns:
        The exit status of the process: 0 after a drain, 128 plus the number of the signal that ended it.

    Raises:
        EnvironmentFault: this machine can never serve the root.
    """
    told = ""
    while True:
        try:
            with make() as daemon:
                daemon.run()
            return daemon.exit_status
        except EnvironmentFault as error:
            if error.code != "daemon-running":
                raise
            if str(error) != told:
                told = str(error)
                log.warning("standing by, nothing is started here; this daemon takes over when the other one ends.\n%s",
                            error, extra={"action": "standby"})  # fmt: skip
        stopped_by = _pause(look_seconds)
        if stopped_by is not None:
            return status_after(stopped_by)


def _pause(seconds: float) -> int | None:
    """Wait; the number of the signal that ended the wait."""
    received: list[int] = []
    woken = threading.Event()

    def on_signal(number: int) -> None:
        received.append(number)
        woken.set()

    with on_stop_signals(on_signal, woken.set):
        woken.wait(seconds)
    return received[0] if received else None
