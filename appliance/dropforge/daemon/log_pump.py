"""Between a job's output and its log.txt: `python -m dropforge.daemon.log_pump --data ROOT --log FILE`.

What a job prints (standard input here) is not trusted: it is read as UTF-8 with replacement, secrets are taken out,
characters that a terminal would obey are written as escapes, and the file is capped: when it is full it becomes
log.1.txt and a new one begins, so the newest output is always there. A process of its own, because it must survive the
job and the daemon to write the last words.
"""

from __future__ import annotations

import argparse
import codecs
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dropforge.daemon.redact import known_secrets, redact
from dropforge.paths import DataRoot

MAX_BYTES = 16 << 20
"""Of log.txt and of log.1.txt each."""
LINE_CHARACTERS = 64 << 10
"""A longer line is cut into lines of this length."""
_READ_BYTES = 1 << 16
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed, and the marks that turn the direction of writing."""


def visible(text: str) -> str:
    """`text` with every character written out that a terminal would obey. A carriage return ends a line."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class CappedFile:
    """Appends to a file; when it is full it is renamed to NAME.1.SUFFIX, replacing what has that name."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._fd).st_size

    def write(self, text: str) -> None:
        """A full disk loses output, never the job: the writer goes on when there is room."""
        data = text.encode("utf-8", "replace")
        if self._size and self._size + len(data) > self._max_bytes:
            self._turn()
        try:
            self._size += os.write(self._fd, data)
        except OSError:
            return

    def _turn(self) -> None:
        try:
            self.path.replace(older(self.path))
            os.close(self._fd)
            self._open()
        except OSError:
            os.ftruncate(self._fd, 0)
            self._size = 0

    def close(self) -> None:
        os.close(self._fd)


def older(path: Path) -> Path:
    """Where the part before the present file is kept."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


class Pump:
    """Cuts a stream of bytes into clean lines. A secret is found wherever it stands inside a line."""

    def __init__(self, write: Callable[[str], None], *, secrets: Sequence[str]) -> None:
        self._write = write
        self._secrets = secrets
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes, *, final: bool = False) -> None:
        text = self._rest + self._decoder.decode(data, final)
        whole, newline, self._rest = text.rpartition("\n")
        if len(self._rest) > LINE_CHARACTERS or final:
            # Cut where there is no line feed. What stays is longer than any secret, so a half-read one is not cut off.
            self._rest = redact(self._rest, self._secrets)
            cut = len(self._rest) - (0 if final else LINE_CHARACTERS // 2)
            whole, newline, self._rest = whole + newline + self._rest[:cut], "\n" if cut else "", self._rest[cut:]
        if whole or newline:
            self._write(visible(redact(whole, self._secrets)) + newline)


def main() -> None:
    parser = argparse.ArgumentParser(prog="dropforge.daemon.log_pump", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()
    root = DataRoot(options.data)
    target = CappedFile(options.log)
    pump = Pump(target.write, secrets=known_secrets(root))
    while data := os.read(sys.stdin.fileno(), _READ_BYTES):
        pump.feed(data)
    pump.feed(b"", final=True)
    target.close()


if __name__ == "__main__":
    main()
