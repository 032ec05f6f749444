"""The number that orders jobs: persisted before it is used, never given twice. Clocks may jump; this does not."""

from __future__ import annotations

import re

from dropforge.daemon.queue import FOLDERS
from dropforge.files import write_text
from dropforge.paths import DataRoot

DIGITS = 6
AT_ONCE = 20
"""So many numbers are persisted in one go at most."""


class Sequence:
    """Gives out the numbers. Of many files many are persisted at once; a restart skips those not given out yet."""

    def __init__(self, root: DataRoot) -> None:
        self._root = root
        self._given = self._persisted = 0
        self._at_once = 1

    def expect(self, files: int) -> None:
        """So many files are there."""
        self._at_once = max(1, min(files, AT_ONCE))

    def take(self) -> int:
        """The next number. A lost or damaged state/sequence is rebuilt from the ids that exist."""
        if self._given == self._persisted:
            used = _stored(self._root) or _highest_in_use(self._root)
            write_text(self._root.state / "sequence", f"{used + self._at_once}\n")
            self._given, self._persisted = used, used + self._at_once
        self._given += 1
        return self._given


def job_id(number: int, *, slug: str, digest: str) -> str:
    """`<seq, 6 digits>-<slug>-<first 8 hex digits of the SHA-256 of the spec's bytes>`."""
    return f"{number:0{DIGITS}d}-{slug}-{digest[:8]}"


def number_of(job_id: str) -> int:
    """The sequence number in an id; 0 when there is none."""
    match = re.match(r"(\d+)-", job_id)
    return int(match[1]) if match else 0


def _stored(root: DataRoot) -> int:
    try:
        return int((root.state / "sequence").read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return 0


def _highest_in_use(root: DataRoot) -> int:
    folders = [root.path / name for name in ("runs", *FOLDERS)]
    return max((number_of(entry.name) for folder in folders for entry in folder.iterdir()), default=0)
