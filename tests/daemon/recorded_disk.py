"""A disk that forgets what was not synced: replays a journal of disk_recorder.py and lays out what a power cut leaves.

Two kinds of file system, both legal (POSIX promises no more than the first):
    strict    a name is durable once its folder was synced, content once its file was synced
    eager     names are durable at once and in order, content once its file was synced (delayed allocation)
A rename is one step: after it the name is at one of the two places, never at both or at none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class Node:
    is_folder: bool
    blob: str | None = None
    """Durable content of a file; None: nothing of it is durable."""
    live: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)


@dataclass(eq=False)
class Change:
    """A change of names that may not be durable yet: (folder, name) that goes, (folder, name, node) that comes."""

    gone: tuple[Node, str] | None = None
    come: tuple[Node, str, Node] | None = None

    @property
    def places(self) -> set[tuple[int, str]]:
        ends = [self.gone, self.come[:2] if self.come else None]
        return {(id(end[0]), end[1]) for end in ends if end}

    def apply(self) -> None:
        if self.gone:
            self.gone[0].durable.pop(self.gone[1], None)
        if self.come:
            self.come[0].durable[self.come[1]] = self.come[2]


class Disk:
    """What is durable, step by step."""

    def __init__(self, base: Path, blobs: Path, *, unsynced: Path | None = None) -> None:
        """As `base` is now. Of files below `unsynced` only the names are durable: somebody copied them a moment ago."""
        self.blobs = blobs
        self.unsynced = unsynced
        self.root = self._load(base)
        self.pending: list[Change] = []

    def _load(self, path: Path) -> Node:
        if path.is_file():
            if self.unsynced is not None and path.is_relative_to(self.unsynced):
                return Node(is_folder=False)
            content = path.read_bytes()
            blob = hashlib.sha256(content).hexdigest()
            (self.blobs / blob).write_bytes(content)
            return Node(is_folder=False, blob=blob)
        inside = {entry.name: self._load(entry) for entry in path.iterdir()}
        return Node(is_folder=True, live=dict(inside), durable=dict(inside))

    def replay(self, journal: Path) -> Iterator[int]:
        """Do one line after another; yields the number of lines done."""
        for number, line in enumerate(journal.read_text().splitlines(), start=1):
            self.step(json.loads(line))
            yield number

    def step(self, line: dict[str, str]) -> None:
        folder, name = self._place(line["path"])
        if folder is None:
            return  # of a folder that is gone
        node = folder.live.get(name) if name else self.root
        op = line["op"]
        if op in ("create", "mkdir") and node is None:
            self._change(come=(folder, name, Node(is_folder=op == "mkdir")))
        elif op == "remove" and node is not None:
            self._change(gone=(folder, name))
        elif op == "rename" and node is not None:
            target, new_name = self._place(line["target"])
            if target is not None:
                self._change(gone=(folder, name), come=(target, new_name, node))
        elif op == "sync" and "blob" in line:
            if node is None:
                node = Node(is_folder=False)
                self._change(come=(folder, name, node))
            node.blob = line["blob"]
        elif op == "sync" and node is not None:
            self._sync(node)

    def _place(self, path: str) -> tuple[Node | None, str]:
        *above, name = path.split("/") if path and not path.startswith("/") else [""]
        folder: Node | None = self.root
        for part in above:
            folder = folder.live.get(part) if folder is not None else None
        return folder, name

    def _change(self, *, gone: tuple[Node, str] | None = None, come: tuple[Node, str, Node] | None = None) -> None:
        if gone:
            gone[0].live.pop(gone[1], None)
        if come:
            come[0].live[come[1]] = come[2]
        self.pending.append(Change(gone, come))

    def _sync(self, folder: Node) -> None:
        """All changes that touch `folder` become durable, with the earlier ones that they build on."""
        wanted: set[tuple[int, str]] = set()
        chosen: list[Change] = []
        for change in reversed(self.pending):
            if any(at == id(folder) for at, _ in change.places) or change.places & wanted:
                wanted |= change.places
                chosen.append(change)
        self.pending = [change for change in self.pending if change not in chosen]
        for change in reversed(chosen):
            change.apply()

    def picture(self, *, eager: bool) -> str:
        """A text that is equal only for equal states."""
        return json.dumps(self._draw(self.root, eager), sort_keys=True)

    def _draw(self, node: Node, eager: bool):
        if not node.is_folder:
            return node.blob or ""
        return {name: self._draw(child, eager) for name, child in (node.live if eager else node.durable).items()}

    def lay_out(self, target: Path, *, eager: bool) -> None:
        """Make the folder that is there when the machine comes up again."""
        self._lay(self.root, target, eager)

    def _lay(self, node: Node, path: Path, eager: bool) -> None:
        if not node.is_folder:
            path.write_bytes((self.blobs / node.blob).read_bytes() if node.blob else b"")
            return
        path.mkdir()
        for name, child in (node.live if eager else node.durable).items():
            self._lay(child, path / name, eager)
