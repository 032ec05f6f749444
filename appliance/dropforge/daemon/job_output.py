"""Standard output and error of a runner, led through a log pump (log_pump.py) while the block is entered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from dropforge.paths import DataRoot

LAST_WORDS_SECONDS = 5.0
"""So long a runner waits at its end for the pump to write everything."""


class JobOutput:
    """Everything this process and its children print goes to `log`, clean and capped.

    When the pump cannot be started, output goes to the file as it comes.
    """

    def __init__(self, root: DataRoot, log: Path) -> None:
        self._root = root
        self._log = log
        self._pump: subprocess.Popen[bytes] | None = None
        self._kept: tuple[int, int] | None = None

    @property
    def pid(self) -> int | None:
        """The pump's process, which must not be ended with the job's."""
        return self._pump.pid if self._pump else None

    def __enter__(self) -> JobOutput:
        read, write = os.pipe()
        command = [sys.executable, "-P", "-m", "dropforge.daemon.log_pump", "--data", str(self._root.path),
                   "--log", str(self._log)]  # fmt: skip
        try:
            # In a session of its own: it has to write what a job says that is killed with its whole session.
            self._pump = subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            print(f"the log is not cleaned: {error}", file=sys.stderr, flush=True)
            os.close(write)
        else:
            self._kept = (os.dup(1), os.dup(2))
            _flush()
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.close(write)
        finally:
            os.close(read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """To be called when nothing else writes any more: the pump ends when the last writer is gone."""
        if self._pump is None or self._kept is None:
            return
        _flush()
        for number, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        try:
            self._pump.wait(LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            self._pump.kill()
            self._pump.wait()


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
