"""The data of a job held fast: what was checked is what is read, even if its name is given to something else meanwhile.

Between the check of a path and its opening by a reader, somebody may put a symbolic link in its place. So every part of
the path is opened without following links, and the file that was reached gets a second name in the run folder (a hard
link, or a copy where that is impossible), which the readers use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from dropforge.errors import DataError
from dropforge.files import sha256_bytes
from dropforge.locate import Locate

_OPEN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def pinned(locate: Locate, *, below: Path, into: Path) -> Locate:
    """`locate`, whose answers are names in `into` of the very files that were found.

    Args:
        below: the data root; every part of a path under it must be a real folder.
        into: a folder of the run, made anew.

    Raises (the function that is returned): DataError as `locate` does, data-refused for a link that was swapped in.
    """
    shutil.rmtree(into, ignore_errors=True)
    known: dict[str, Path] = {}

    def locate_pinned(path: str) -> Path:
        if path not in known:
            known[path] = _pin(locate(path), path, below=below, into=into)
        return known[path]

    return locate_pinned


def _pin(found: Path, path: str, *, below: Path, into: Path) -> Path:
    target = into / sha256_bytes(path.encode())[:12] / found.name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(found, below) as fd:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                _pin_folder(fd, target)
            else:
                _pin_file(fd, target)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data {path!r} is refused", code="data-refused", where="data.train",
            why=f"it changed while it was opened ({error})",
            fix="leave the data alone while a job reads it, then `retry`",
        ) from error  # fmt: skip
    return target


@contextlib.contextmanager
def _opened(found: Path, below: Path) -> Iterator[int]:
    """A handle on `found`, reached from `below` without following a link. Raises OSError, ValueError."""
    fd = os.open(below, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in found.relative_to(below).parts:
            deeper = os.open(part, _OPEN, dir_fd=fd)
            os.close(fd)
            fd = deeper
        yield fd
    finally:
        os.close(fd)


def _pin_folder(fd: int, target: Path) -> None:
    target.mkdir()
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        names = os.listdir(readable)  # noqa: PTH208  (of an open folder)
    finally:
        os.close(readable)
    for name in names:
        inner = os.open(name, _OPEN, dir_fd=fd)
        try:
            if stat.S_ISDIR(os.fstat(inner).st_mode):
                _pin_folder(inner, target / name)
            else:
                _pin_file(inner, target / name)
        finally:
            os.close(inner)


def _pin_file(fd: int, target: Path) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ValueError("it is a link or a special file")
    name = f"/proc/self/fd/{fd}"
    try:
        os.link(name, target, src_dir_fd=fd)  # the handle makes Python ask for the file behind the name in /proc
    except OSError:  # another file system, or a foreign file that this user may read but not link
        with open(name, "rb") as source, target.open("wb") as copy:  # noqa: PTH123  (a handle, not a path)
            shutil.copyfileobj(source, copy)
