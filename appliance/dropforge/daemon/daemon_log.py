"""`state/daemon.log`: what the daemon says, kept on the data root as well, capped. No way out lets a secret through."""

from __future__ import annotations

import contextlib
import logging
from logging.handlers import RotatingFileHandler
from types import TracebackType

from dropforge.daemon.redact import known_secrets, redact
from dropforge.paths import DataRoot

MAX_BYTES = 4 << 20
"""Of daemon.log and of daemon.log.1 each."""


class DaemonLog:
    """Writes the log while entered."""

    def __init__(self, root: DataRoot) -> None:
        self._root = root
        self._logger = logging.getLogger("dropforge.daemon")
        self._filter = _Redact(root)
        self._handler: logging.Handler | None = None

    def __enter__(self) -> DaemonLog:
        self._handler = _File(self._root.state / "daemon.log", maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8",
                              errors="backslashreplace", delay=True)  # fmt: skip
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self._logger.addFilter(self._filter)
        self._logger.addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is not None:
            self._logger.removeHandler(self._handler)
            self._logger.removeFilter(self._filter)
            self._handler.close()
            self._handler = None


class _File(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (its name in logging)
        """A full disk loses lines of this file only; they are on standard error as well."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is tried once more here
            super().close()


class _Redact(logging.Filter):
    def __init__(self, root: DataRoot) -> None:
        super().__init__()
        self._root = root

    def filter(self, record: logging.LogRecord) -> bool:
        secrets = known_secrets(self._root)
        if secrets:
            record.msg, record.args = redact(record.getMessage(), secrets), ()
            if record.exc_info and not record.exc_text:
                record.exc_text = redact(logging.Formatter().formatException(record.exc_info), secrets)
        return True
