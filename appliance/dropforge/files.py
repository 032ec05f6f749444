"""Files that are whole or absent: write to a temporary sibling, fsync, rename, fsync the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make every file below `folder` survive a power cut, with its name: a file's fsync does not cover the latter."""
    for path in regular_files(folder):
        fsync_file(path)
    for below in (*(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), folder):
        fsync_folder(below)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data` atomically and durably."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fill_new_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder that nothing points to yet, durably: whoever finds half of it removes it.

    Half the synchronising of `write_bytes` for each.
    """
    for name, data in files.items():
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    fsync_folder(folder)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """Indented, keys in the given order, refuses NaN (not JSON)."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def append_json_line(path: Path, value: Any) -> None:
    """Append one line in one write, so that a reader sees at most a torn last line."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        os.write(fd, line.encode("utf-8"))
    finally:
        os.close(fd)


def read_json_lines(path: Path) -> Iterator[Any]:
    """Every complete line; a torn last line (power cut) is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def regular_files(folder: Path) -> list[Path]:
    """All regular files below `folder`, sorted by relative name; links are left out."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def rename_folder(source: Path, target: Path) -> None:
    """Put a finished folder in its final place: fsync all in it, drop an old target, rename, fsync the parent."""
    fsync_tree(source)
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    fsync_folder(target.parent)


def free_bytes(folder: Path) -> int:
    """Free space on the file system that really holds `folder` (the nearest existing parent)."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    return shutil.disk_usage(probe).free
