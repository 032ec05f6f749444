"""What lies in the inbox, and which of it is finished: unchanged over two looks at least `settle_seconds` apart.

A half-copied YAML file is often a valid, shorter spec, so settling is not optional. Time is the daemon's monotonic
clock, passed in; modification times are compared for equality only, never with a clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dropforge.daemon.names import is_ignored
from dropforge.files import read_json, sha256_bytes, write_json
from dropforge.paths import DataRoot

READY_SUFFIX = ".ready"
FOLDER_ENTRIES = 10_000
"""A job folder with more entries is refused; looking at it would hold up the queue."""


class Fingerprint(NamedTuple):
    """Changes whenever the entry changes, not when it is renamed.

    A tuple, because a flood compares 20,000 of them every second.
    """

    parts: tuple[tuple[str, int, int, int], ...]
    """(path below the entry, inode, size, mtime in ns) of it and of all it holds."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(size for _, _, size, _ in self.parts)

    @property
    def token(self) -> str:
        """A text that is equal only for equal fingerprints; names that are not UTF-8 are fine."""
        return sha256_bytes(repr(self.parts).encode("utf-8", "surrogateescape"))


def fingerprint(path: Path) -> Fingerprint | None:
    """None when the entry is gone. Links are not followed."""
    try:
        info = path.lstat()
        parts = [_part("", info)]
        if stat.S_ISDIR(info.st_mode):
            parts += _inside(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Fingerprint(tuple(parts))


def _fingerprint_of(entry: os.DirEntry[str]) -> Fingerprint | None:
    """As `fingerprint`, at a third of the price for plain files: 20,000 of them are looked at every second."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return fingerprint(Path(entry.path))
        info = entry.stat(follow_symlinks=False)
        return Fingerprint((("", info.st_ino, info.st_size, info.st_mtime_ns),))
    except FileNotFoundError:
        return None


def _inside(folder: Path) -> list[tuple[str, int, int, int]]:
    parts: list[tuple[str, int, int, int]] = []
    todo = [""]
    while todo and len(parts) <= FOLDER_ENTRIES:
        below = todo.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                parts.append(_part(name, entry.stat(follow_symlinks=False)))
                if entry.is_dir(follow_symlinks=False):
                    todo.append(name)
    return sorted(parts)


def _part(name: str, info: os.stat_result) -> tuple[str, int, int, int]:
    # A folder's size and time change with its entries, which are listed themselves; renaming it changes neither.
    is_folder = stat.S_ISDIR(info.st_mode)
    return name, info.st_ino, 0 if is_folder else info.st_size, 0 if is_folder else info.st_mtime_ns


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at the inbox."""

    entries: Mapping[str, Fingerprint]
    """Everything that may become a job, by name."""
    staged: frozenset[Fingerprint]
    """What lies in inbox/.staging: what is renamed from there is complete."""


def look(root: DataRoot) -> Look:
    """List the inbox and its staging folder. Raises OSError when the inbox cannot be read."""
    entries: dict[str, Fingerprint] = {}
    with os.scandir(root.inbox) as listing:
        for entry in listing:
            if not is_ignored(entry.name):
                seen = _fingerprint_of(entry)
                if seen is not None:
                    entries[entry.name] = seen
    staged = (fingerprint(path) for path in _staged_paths(root))
    return Look(entries=entries, staged=frozenset(print_ for print_ in staged if print_ is not None))


def _staged_paths(root: DataRoot) -> list[Path]:
    try:
        return [path for path in root.staging.iterdir() if not path.name.endswith(READY_SUFFIX)]
    except FileNotFoundError:
        return []


def ready_marker(root: DataRoot, name: str) -> Path:
    """Written by `submit` before its rename: the fingerprint of what it wrote completely."""
    return root.staging / f"{name}{READY_SUFFIX}"


def marked_names(root: DataRoot) -> frozenset[str]:
    """Names that have a marker: one listing, instead of one failed opening per file of a flood."""
    try:
        with os.scandir(root.staging) as listing:
            return frozenset(e.name.removesuffix(READY_SUFFIX) for e in listing if e.name.endswith(READY_SUFFIX))
    except FileNotFoundError:
        return frozenset()


def mark_ready(root: DataRoot, name: str, seen: Fingerprint) -> None:
    write_json(ready_marker(root, name), {"fingerprint": seen.token})


def is_marked_ready(root: DataRoot, name: str, seen: Fingerprint) -> bool:
    try:
        marked = read_json(ready_marker(root, name))
    except (FileNotFoundError, OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return bool(marked == {"fingerprint": seen.token})


def clear_mark(root: DataRoot, name: str) -> None:
    """The entry has been taken. A mark that stays behind is harmless: its fingerprint fits nothing else."""
    with contextlib.suppress(OSError):
        ready_marker(root, name).unlink()


@dataclass(frozen=True)
class Ready:
    """An entry that is finished, or will be when it stays as it is for long enough."""

    name: str
    fingerprint: Fingerprint
    unchanged_since: float
    """Monotonic seconds at which this content was first seen."""
    complete: bool
    """True when it was renamed from staging: there is no need to doubt that all of it is there."""


class SettleTracker:
    """Remembers since when each entry of the inbox has been as it is."""

    def __init__(self, root: DataRoot, *, settle_seconds: float) -> None:
        self._root = root
        self._settle_seconds = settle_seconds
        self._seen: dict[str, Ready] = {}
        self._staged: frozenset[Fingerprint] = frozenset()
        self.settles_at = float("inf")
        """Monotonic time at which the next entry will have settled, if nothing changes."""
        self.settling = 0
        """How many have not settled."""

    @property
    def waiting(self) -> Collection[str]:
        return self._seen.keys()

    def update(self, seen: Look, *, now: float, complete: frozenset[str] = frozenset()) -> list[Ready]:
        """Take one look into account; returns what is finished, oldest first (then by name).

        `complete` names the entries that are known to have been renamed from staging.
        """
        for name in self._seen.keys() - seen.entries.keys():
            del self._seen[name]
        ready = []
        self.settles_at = float("inf")
        marked = marked_names(self._root)
        for name, print_ in seen.entries.items():
            known = self._seen.get(name)
            if known is None or known.fingerprint != print_:
                whole = name in complete or print_ in self._staged
                whole = whole or (name in marked and is_marked_ready(self._root, name, print_))
                known = self._seen[name] = Ready(name, print_, now, whole)
            since = known.unchanged_since
            if known.complete or (now > since and now - since >= self._settle_seconds):
                ready.append(known)
            else:
                self.settles_at = min(self.settles_at, since + self._settle_seconds)
        self.settling = len(seen.entries) - len(ready)
        # An inode alone proves nothing (it is reused at once); size and time must be what they were in staging as well.
        self._staged = seen.staged
        return sorted(ready, key=attrgetter("unchanged_since", "name"))
