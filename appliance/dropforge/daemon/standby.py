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
STANDING_BY = "standing by, nothing is started here; this daemon takes over when the other one ends"


def serve(make: Callable[[], Daemon], *, look_seconds: float = LOOK_SECONDS) -> int:
    """Serve a data root until told to stop, standing by while another daemon serves it.

    Args:
        make: a fresh daemon for every look.

    Returns:
        The exit status of the process: 0 after a drain, 128 plus the number of the signal that ended it.

    Raises:
        EnvironmentFault: this machine can never serve the root.
    """
    received: list[int] = []
    woken = threading.Event()

    def on_signal(number: int) -> None:
        received.append(number)
        woken.set()

    def leave_at_once() -> None:
        raise SystemExit(status_after(received[0]))

    told = ""
    with on_stop_signals(on_signal, leave_at_once):
        while not received:
            try:
                with make() as daemon:
                    if not received:
                        daemon.run()
                        return daemon.exit_status
            except EnvironmentFault as error:
                if error.code != "daemon-running":
                    raise
                if str(error) != told:
                    told = str(error)
                    log.warning("%s\n%s", STANDING_BY, error, extra={"action": "standby"})
                woken.wait(look_seconds)
    return status_after(received[0])
