"""Dropped data made durable before its job is accepted.

Who copied it in did not wait for the disk, and a power cut would leave a job whose data is empty. A large folder takes
a while, so it is done beside the loop.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from dropforge.daemon.names import printable
from dropforge.daemon.watcher import Fingerprint
from dropforge.files import fsync_tree

log = logging.getLogger("dropforge.daemon")

PATIENCE_SECONDS = 0.5
"""So long the loop waits for it: enough for all but large folders."""


class FolderSync:
    """Remembers which folders of the inbox are being written to the disk, or are there."""

    def __init__(self) -> None:
        self._threads: dict[str, tuple[Fingerprint, threading.Thread]] = {}

    def forget_all_but(self, names: set[str]) -> None:
        self._threads = {name: known for name, known in self._threads.items() if name in names}

    def done(self, folder: Path, seen: Fingerprint) -> bool:
        """True once everything in `folder`, as it is in `seen`, is on the disk. Starts that when it is asked first."""
        known = self._threads.get(folder.name)
        if known is None or known[0] != seen:
            thread = threading.Thread(target=_sync, args=(folder,), name="folder-sync", daemon=True)
            thread.start()
            known = self._threads[folder.name] = (seen, thread)
        known[1].join(PATIENCE_SECONDS)
        return not known[1].is_alive()


def _sync(folder: Path) -> None:
    try:
        fsync_tree(folder)
    except OSError as error:  # taken back, or not readable: reading it will say the same, with the reason
        log.warning("inbox/%s could not be made durable: %s", printable(folder.name), error, extra={"action": "sync"})
