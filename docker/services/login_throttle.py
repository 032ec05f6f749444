"""Jupyter's password login, made slow to guess.

Five wrong passwords from one address within ten minutes close the login for that address: 30 s, then twice as long
after each further one, up to 15 minutes. Sixty wrong ones within a minute from everywhere close it for everybody who is
not logged in, for the rest of that minute, because each guess costs the server about 0.1 s. Sessions that exist go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jupyter_server.auth.identity import PasswordIdentityProvider, User
from tornado.web import Finish, RequestHandler

FREE_FAILURES = 5
WINDOW_SECONDS = 600.0
FIRST_WAIT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 900.0
FAILURES_PER_MINUTE = 60
ADDRESSES_KEPT = 10_000


@dataclass
class Throttle:
    """Counts failures by address. `clock` gives monotonic seconds."""

    clock: Callable[[], float] = time.monotonic
    _failures: dict[str, deque[float]] = field(default_factory=dict)
    _recent: deque[float] = field(default_factory=deque)

    def wait(self, address: str) -> float:
        """Seconds until `address` may try again; 0 when it may now."""
        now = self.clock()
        while self._recent and now - self._recent[0] >= 60:
            self._recent.popleft()
        waits = [60 - (now - self._recent[0])] if len(self._recent) >= FAILURES_PER_MINUTE else [0.0]
        failures = self._failures.get(address)
        if failures and len(failures) >= FREE_FAILURES:
            closed = min(FIRST_WAIT_SECONDS * 2 ** (len(failures) - FREE_FAILURES), LONGEST_WAIT_SECONDS)
            waits.append(failures[-1] + closed - now)
            if now - failures[-1] >= WINDOW_SECONDS + closed:
                del self._failures[address]
        return max(waits)

    def failed(self, address: str) -> None:
        now = self.clock()
        self._recent.append(now)
        failures = self._failures.setdefault(address, deque(maxlen=FREE_FAILURES + 10))
        while failures and len(failures) < FREE_FAILURES and now - failures[0] >= WINDOW_SECONDS:
            failures.popleft()
        failures.append(now)
        if len(self._failures) > ADDRESSES_KEPT:
            self._failures.pop(next(iter(self._failures)))

    def succeeded(self, address: str) -> None:
        self._failures.pop(address, None)


class ThrottledLogin(PasswordIdentityProvider):
    """Password login with a Throttle. Passwords are taken as typed: leading and trailing spaces count."""

    throttle = Throttle()

    def validate_security(self, app: Any, ssl_options: dict[str, Any] | None = None) -> None:
        """Nothing to warn about: in a container the server must listen on every address, and there is a password."""

    def process_login_form(self, handler: RequestHandler) -> User | None:
        """The user, or None for a wrong password. Answers 429 while the login is closed."""
        address = handler.request.remote_ip or "unknown"
        wait = self.throttle.wait(address)
        if wait > 0:
            handler.set_status(429)
            handler.set_header("Retry-After", str(int(wait) + 1))
            handler.finish(f"Too many wrong passwords; try again in {int(wait) + 1} seconds.")
            raise Finish
        if not self.passwd_check(handler.get_body_argument("password", default="", strip=False)):
            self.throttle.failed(address)
            return None
        self.throttle.succeeded(address)
        return self.generate_anonymous_user(handler)
