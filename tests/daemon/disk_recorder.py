"""Writes down, in order, what a process does to the file system below a folder: what a power cut would make of it.

`install(root, journal)` in a child process; `recorded_disk.py` reads the journal. One JSON object a line:

    {"op": "create" | "mkdir" | "remove", "path"}     a name appears or goes
    {"op": "rename", "path", "target"}
    {"op": "sync", "path", "blob"}                    fsync of a file: its content as of now is blobs/<blob>
    {"op": "sync", "path"}                            fsync of a folder: its names as of now are durable

Python's own audit events tell of names, a wrapper around os.fsync of what was made durable. A file written by a library in
another language shows when it is synced.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any


class Recorder:
    def __init__(self, root: Path, journal: Path) -> None:
        self.root = f"{root}/"
        self.blobs = journal.parent / "blobs"
        self.blobs.mkdir(exist_ok=True)
        self.fd = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.fsync = os.fsync
        self.busy = False

    def write(self, op: str, path: str, **more: str) -> None:
        if f"{path}/".startswith(self.root) or more.get("target", "").startswith(self.root):
            line = {"op": op, "path": self._below(path), **more}
            if "target" in more:
                line["target"] = self._below(more["target"])
            os.write(self.fd, json.dumps(line).encode("ascii") + b"\n")

    def _below(self, path: str) -> str:
        return "" if f"{path}/" == self.root else path.removeprefix(self.root)

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"):
            return
        self.busy = True
        try:
            self._note(event, arguments)
        finally:
            self.busy = False

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _mode, flags = arguments
            if isinstance(path, (str, bytes)) and flags & os.O_CREAT:
                self.write("create", absolute(path, -1))
        elif event == "os.rename":
            source, target, source_fd, target_fd = arguments
            self.write("rename", absolute(source, source_fd), target=absolute(target, target_fd))
        elif event == "os.link":
            self.write("create", absolute(arguments[1], arguments[3]))
        elif event == "os.mkdir":
            self.write("mkdir", absolute(arguments[0], arguments[2]))
        else:
            self.write("remove", absolute(arguments[0], arguments[1]))

    def synced(self, fd: int) -> None:
        self.fsync(fd)
        name = f"/proc/self/fd/{fd}"
        path = os.readlink(name)  # noqa: PTH115  (os.fsync is called with numbers)
        self.busy = True
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                self.write("sync", path)
            elif path.startswith(self.root) and not path.endswith(" (deleted)"):
                content = Path(name).read_bytes()
                blob = hashlib.sha256(content).hexdigest()
                if not (self.blobs / blob).exists():
                    (self.blobs / f"{blob}.{os.getpid()}").write_bytes(content)
                    (self.blobs / f"{blob}.{os.getpid()}").rename(self.blobs / blob)
                self.write("sync", path, blob=blob)
        finally:
            self.busy = False


def absolute(path: str | bytes | os.PathLike, folder: int) -> str:
    text = os.fsdecode(path)
    if not text.startswith("/"):
        below = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else str(Path.cwd())  # noqa: PTH115
        text = f"{below}/{text}"
    return os.path.normpath(text)


def install(root: Path, journal: Path) -> None:
    """For the rest of this process's life."""
    recorder = Recorder(root, journal)
    sys.addaudithook(recorder.on_event)
    os.fsync = recorder.synced
