"""What went wrong around the jobs (full disk, unreadable inbox, a bug of ours): logged, shown, never fatal."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dropforge.daemon.names import printable
from dropforge.errors import DropforgeError

log = logging.getLogger("dropforge.daemon")


class Faults:
    """The standing faults, by what was being done. A success, or `seconds` without a new failure, removes one."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._standing: dict[str, tuple[str, float]] = {}

    @property
    def messages(self) -> list[str]:
        return sorted(message for message, _ in self._standing.values())

    def stands(self, what: str) -> bool:
        return what in self._standing

    def expire(self, now: float) -> None:
        self._standing = {what: fault for what, fault in self._standing.items() if now < fault[1]}

    def guard(self, what: str, action: Callable[[], object], *, now: float) -> bool:
        """Run `action`; False when it failed, which is then logged once and shown in STATUS.md."""
        try:
            action()
        except (OSError, DropforgeError) as error:
            self._note(what, f"{printable(what)}: {error}", now)
            return False
        except Exception:
            log.exception("internal fault at %s", printable(what), extra={"action": "internal"})
            self._note(what, f"{printable(what)}: internal fault of Dropforge, see the daemon's log", now)
            return False
        self._standing.pop(what, None)
        return True

    def _note(self, what: str, message: str, now: float) -> None:
        if self._standing.get(what, ("", 0.0))[0] != message:
            log.error("%s", message, extra={"action": "fault"})
        self._standing[what] = (message, now + self._seconds)
