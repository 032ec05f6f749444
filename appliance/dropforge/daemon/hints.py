"""inotify as a hint: wake the loop at once, and tell which files were renamed from inbox/.staging into inbox/.

Polling is the mechanism and works without this: on mounts that report no events (Windows folders, network disks) files
settle as usual. See inotify(7); the standard library has no binding.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import struct
import time
from collections.abc import Iterable
from types import TracebackType

from dropforge.paths import DataRoot

log = logging.getLogger("dropforge.daemon")

_IN_MODIFY, _IN_CLOSE_WRITE, _IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x8, 0x40, 0x80, 0x100  # <sys/inotify.h>
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_BUFFER = 64 * 1024
_REMEMBERED = 10_000
"""Names and cookies nobody asked for are forgotten beyond this number; their files then settle as usual."""


class Hints:
    """Watches inbox/, inbox/.staging/ and control/ while entered. Without inotify it never has anything to say."""

    def __init__(self, root: DataRoot) -> None:
        self._root = root
        self._fd = self._wake_fd = -1
        self._inbox = self._staging = self._control = -1
        self._moved_out: set[int] = set()
        """Cookies of renames out of staging whose other half has not been read yet."""
        self._complete: set[str] = set()
        self._urgent = False

    def __enter__(self) -> Hints:
        libc = ctypes.CDLL(None, use_errno=True)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._fd = libc.inotify_init1(_FLAGS)
        if self._fd < 0:
            log.warning("no inotify (%s): polling only", os.strerror(ctypes.get_errno()), extra={"action": "no-hints"})
            return self
        written = _IN_MODIFY | _IN_CLOSE_WRITE | _IN_CREATE | _IN_MOVED_TO
        self._inbox = libc.inotify_add_watch(self._fd, os.fsencode(self._root.inbox), written)
        self._staging = libc.inotify_add_watch(self._fd, os.fsencode(self._root.staging), _IN_MOVED_FROM)
        self._control = libc.inotify_add_watch(self._fd, os.fsencode(self._root.control), written)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._fd, self._wake_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._wake_fd = -1

    def wake(self) -> None:
        """End a `wait` at once. For signal handlers and other threads."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def wait(self, seconds: float) -> bool:
        """Sleep, at most `seconds`. True when a complete file or a request has come; a growing file does not count."""
        deadline = time.monotonic() + seconds
        watched = [fd for fd in (self._fd, self._wake_fd) if fd >= 0]
        while (left := deadline - time.monotonic()) > 0:
            ready = select.select(watched, [], [], left)[0]
            self._read()
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
                break
            if self._urgent:
                break
        urgent, self._urgent = self._urgent, False
        return urgent

    def take_complete(self, names: Iterable[str]) -> frozenset[str]:
        """Those of `names` that came into the inbox by a rename from staging and were not written to since.

        Call it after the folder was listed: then every rename the listing shows has been reported.
        """
        self._read()
        taken = self._complete.intersection(names)
        self._complete -= taken
        return frozenset(taken)

    def _read(self) -> None:
        while self._fd >= 0:
            try:
                raw = os.read(self._fd, _BUFFER)
            except BlockingIOError:
                break
            self._note(raw)
        if len(self._complete) + len(self._moved_out) > _REMEMBERED:
            self._complete.clear()
            self._moved_out.clear()

    def _note(self, raw: bytes) -> None:
        """Match the two halves of each rename by their cookie."""
        at = 0
        while at < len(raw):
            watch, mask, cookie, length = _EVENT.unpack_from(raw, at)
            name = os.fsdecode(raw[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
            at += _EVENT.size + length
            if watch == self._control:
                self._urgent = True
            elif watch == self._staging and mask & _IN_MOVED_FROM:
                self._moved_out.add(cookie)
            elif watch == self._inbox and mask & _IN_MOVED_TO and cookie in self._moved_out:
                self._moved_out.discard(cookie)
                self._complete.add(name)
                self._urgent = True
            elif watch == self._inbox:
                self._complete.discard(name)
