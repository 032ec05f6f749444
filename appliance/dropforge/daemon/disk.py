"""A disk that fills up: a reserve that is given back in time, room made by ourselves, and when to go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dropforge.checkpoints import CheckpointStore
from dropforge.daemon.unexpected import no_space_in
from dropforge.files import TEMPORARY_PREFIX, free_bytes, regular_files
from dropforge.paths import DataRoot, RunFolder

MIB = 1 << 20
RESERVE_BYTES = 16 * MIB
SMALL_BYTES = MIB // 4
FEW_NAMES = 64
"""Fewer files than this that can still be made count as a full disk: a checkpoint alone is a dozen."""
LOW_BYTES = 64 * MIB
"""Below this nothing is started, and the reserve is given back so that states can still be written."""
MARGIN_BYTES = 64 * MIB
"""At least so much more must be free before a job that filled the disk goes on."""


def reserve_path(root: DataRoot) -> Path:
    return root.state / "reserve"


class DiskWatch:
    """Looks at the data root's file system."""

    def __init__(self, root: DataRoot, *, free: Callable[[Path], int] = free_bytes) -> None:
        self._root = root
        self._measure = free
        self.free = 0
        self.low = False

    @property
    def text(self) -> str:
        return f"{self.free // MIB} MiB of disk are free, at least {(LOW_BYTES + RESERVE_BYTES) // MIB} MiB are needed"

    def measure(self) -> int:
        """Free bytes; none where hardly a file can be made any more, however many bytes are free."""
        return self._measure(self._root.path) if _has_inodes(self._root.path) else 0

    def look(self) -> None:
        """Measure; give the reserve back when space is low, take it again when there is plenty."""
        self.free = self.measure()
        if self.free < LOW_BYTES:
            self.low = True
            give_reserve_back(self._root)
        elif self.free >= LOW_BYTES + RESERVE_BYTES:
            self.low = False
            self._take_reserve()

    def _take_reserve(self) -> None:
        path = reserve_path(self._root)
        if path.exists() and path.stat().st_size == RESERVE_BYTES:
            return
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        finally:
            os.close(fd)


def is_full(root: DataRoot) -> bool:
    """True when there is no room for even a small file."""
    return DiskWatch(root).measure() < SMALL_BYTES


def give_reserve_back(root: DataRoot) -> None:
    reserve_path(root).unlink(missing_ok=True)


def with_reserve(root: DataRoot, write: Callable[[], object]) -> None:
    """Do `write`; on a full disk give the reserve back and do it again. Raises what the second try raises."""
    try:
        write()
    except OSError as error:
        if not no_space_in(error):
            raise
        give_reserve_back(root)
        write()


def make_room(run: RunFolder) -> int:
    """Remove what a run can do without: half-written files, and all checkpoints but the newest good one.

    Returns the bytes freed. Nothing is removed from checkpoints when none of them is good.
    """
    doomed = list(run.path.glob(f"{TEMPORARY_PREFIX}*"))
    if run.checkpoints.is_dir():
        store = CheckpointStore(run.checkpoints)
        newest, _ = store.newest_good()
        doomed.append(store.partial)
        doomed += [checkpoint.path for checkpoint in store.all() if newest and checkpoint.step != newest.step]
    freed = sum(size_of(path) for path in doomed)
    for path in doomed:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return freed


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 when it is gone."""
    try:
        return sum(file.stat().st_size for file in (regular_files(path) if path.is_dir() else [path]))
    except FileNotFoundError:
        return 0


def needed_to_go_on(run: RunFolder, *, free: int) -> int:
    """Free bytes that must be there before a job that met a full disk at `free` bytes is tried again."""
    newest = max(CheckpointStore(run.checkpoints).all(), key=lambda checkpoint: checkpoint.step, default=None)
    return free + max(MARGIN_BYTES, size_of(newest.path) if newest else 0)


def _has_inodes(folder: Path) -> bool:
    told = os.statvfs(folder)
    return told.f_files == 0 or told.f_favail >= FEW_NAMES  # some file systems have no fixed number and say 0
