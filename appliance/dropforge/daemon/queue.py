"""Tickets: one small JSON file per job. The folder it lies in is the job's state; moving it is one rename.

A ticket says what was accepted. How far the job has come is in runs/<id>/ (attempts, status.json); if the two disagree
the ticket's place wins.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dropforge.errors import EnvironmentFault
from dropforge.files import fsync_folder, read_json, write_json
from dropforge.paths import TICKET_FOLDERS, DataRoot
from dropforge.states import State

LIVE_FOLDERS = ("queue", "running", "held")
FOLDERS = tuple(dict.fromkeys(TICKET_FOLDERS.values()))
"""Every folder that holds tickets, in the order of DESIGN section 4."""
FOLDER_STATE = {"queue": State.QUEUED, "running": State.PREPARING, "held": State.HELD, "done": State.SUCCEEDED,
                "partial": State.PARTIAL, "failed": State.FAILED, "cancelled": State.CANCELLED,
                "rejected": State.REJECTED}  # fmt: skip
"""The state of a ticket whose status.json says nothing that fits its folder."""
_STATES: dict[Any, State] = {state.value: state for state in State}


def state_in(folder: str, written: Any) -> State | None:
    """The state that status.json says, if there is such a state and it belongs into `folder`."""
    state = _STATES.get(written) if isinstance(written, str) else None
    return state if state is not None and TICKET_FOLDERS[state] == folder else None


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What the daemon promised to do."""

    id: str
    name: str
    slug: str
    seq: int
    """Order of acceptance; never reused."""
    file: str
    """Name of the dropped file or folder."""
    digest: str
    """SHA-256 of the spec's bytes; for a job folder of all its contents. Empty: too large to compare."""
    priority: int = 50
    gpus: int | str = 1
    time_limit: float | None = None
    """Seconds of running over all attempts."""
    accepted: str = ""
    """UTC, for people."""
    retried_after: int = 0
    """Attempts up to this number no longer count against the job: a person asked for another try."""

    def as_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> Ticket:
        """Raises ValueError when `value` is not a ticket."""
        if not isinstance(value, dict) or value.get("schema") != 1:
            raise ValueError("not a ticket")
        known = {field.name for field in fields(cls)}
        try:
            ticket = cls(**{key: item for key, item in value.items() if key in known})
        except TypeError as error:
            raise ValueError(f"not a ticket: {error}") from None
        for name in ("seq", "priority", "retried_after"):
            if type(value.get(name, 0)) is not int:
                raise ValueError(f"not a ticket: {name} is not a whole number")
        return ticket


def read(path: Path) -> Ticket | None:
    """None when the file is gone or is not a ticket (a claim that was cut off, or something edited by hand)."""
    try:
        ticket = Ticket.from_json(read_json(path))
    except (FileNotFoundError, ValueError):  # JSON and Unicode errors are ValueErrors
        return None
    return ticket if ticket.id == path.stem else None


def ticket_path(root: DataRoot, folder: str, job_id: str) -> Path:
    return root.path / folder / f"{job_id}.json"


def ids_in(root: DataRoot, folder: str) -> list[str]:
    """Ids of the tickets in a folder, ascending, which is the order of acceptance."""
    with os.scandir(root.path / folder) as entries:
        return sorted(
            entry.name[: -len(".json")]
            for entry in entries
            if entry.name.endswith(".json") and not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)
        )


def find(root: DataRoot, job_id: str) -> tuple[str, Ticket] | None:
    """Folder and ticket of a job, wherever it lies."""
    for folder in FOLDERS:
        ticket = read(ticket_path(root, folder, job_id))
        if ticket is not None:
            return folder, ticket
    return None


def all_tickets(root: DataRoot) -> Iterator[tuple[str, Ticket]]:
    for folder in FOLDERS:
        for job_id in ids_in(root, folder):
            ticket = read(ticket_path(root, folder, job_id))
            if ticket is not None:
                yield folder, ticket


def put(root: DataRoot, folder: str, ticket: Ticket) -> None:
    """Write or replace a ticket in place."""
    write_json(ticket_path(root, folder, ticket.id), ticket.as_json())


def move(root: DataRoot, job_id: str, *, source: str, state: State) -> str:
    """Put the ticket where `state` belongs: the commit of every transition. Returns the new folder."""
    target = TICKET_FOLDERS[state]
    if target != source:
        rename(ticket_path(root, source, job_id), ticket_path(root, target, job_id))
    return target


def rename(source: Path, target: Path) -> None:
    """One atomic, durable rename inside the data root."""
    rename_lightly(source, target)
    fsync_folder(target.parent)
    fsync_folder(source.parent)


def rename_lightly(source: Path, target: Path) -> None:
    """As `rename`, but durable only when the caller has synced both folders, the target's first."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise EnvironmentFault(
            f"{source.parent.name}/ and {target.parent.name}/ are on different mounts",
            code="data-root-split", where=str(source.parent),
            why="a job changes its state by a rename, which is atomic only inside one mount",
            fix="mount the whole data root as one volume instead of single folders of it",
        ) from error  # fmt: skip


class TicketBook:
    """The live tickets in memory, brought up to date from folder listings, so that 10,000 queued jobs cost one scan.

    Only the daemon moves tickets, but people delete and move them too: the listing is what counts.
    """

    def __init__(self, root: DataRoot) -> None:
        self._root = root
        self._folders: dict[str, dict[str, Ticket]] = {folder: {} for folder in LIVE_FOLDERS}
        self._by_digest: dict[str, dict[str, Ticket]] = {}
        """Live jobs by content, then by id: 10,000 new files must not each search 10,000 tickets."""

    def refresh(self) -> list[str]:
        """Read the listings again. Returns ids of queued tickets that vanished: a person deleted or moved them."""
        vanished: list[str] = []
        for folder, known in self._folders.items():
            present = ids_in(self._root, folder)
            for job_id in set(known) - set(present):
                self._drop(folder, job_id)
                if folder == "queue":
                    vanished.append(job_id)
            for job_id in present:
                if job_id not in known:
                    ticket = read(ticket_path(self._root, folder, job_id))
                    if ticket is not None:
                        self.add(folder, ticket)
        return vanished

    def tickets(self, folder: str) -> list[Ticket]:
        return list(self._folders[folder].values())

    def get(self, folder: str, job_id: str) -> Ticket | None:
        return self._folders[folder].get(job_id)

    def folder_of(self, job_id: str) -> str | None:
        return next((folder for folder, known in self._folders.items() if job_id in known), None)

    def with_digest(self, digest: str) -> Ticket | None:
        """A live job with the same content."""
        return next(iter(self._by_digest.get(digest, {}).values()), None) if digest else None

    def add(self, folder: str, ticket: Ticket) -> None:
        self._folders[folder][ticket.id] = ticket
        self._by_digest.setdefault(ticket.digest, {})[ticket.id] = ticket

    def _drop(self, folder: str, job_id: str) -> Ticket | None:
        ticket = self._folders[folder].pop(job_id, None)
        if ticket is not None:
            same = self._by_digest.get(ticket.digest, {})
            same.pop(job_id, None)
            if not same:
                self._by_digest.pop(ticket.digest, None)
        return ticket

    def move(self, job_id: str, *, source: str, state: State) -> None:
        target = move(self._root, job_id, source=source, state=state)
        if source in self._folders and target != source:
            ticket = self._drop(source, job_id)
            if ticket is not None and target in self._folders:
                self.add(target, ticket)

    def replace(self, ticket: Ticket, *, folder: str, **changes: Any) -> Ticket:
        """Change fields of a ticket where it lies, on disk and, if it is a live one, in memory."""
        fresh = replace(ticket, **changes)
        put(self._root, folder, fresh)
        if folder in self._folders:
            self.add(folder, fresh)
        return fresh
