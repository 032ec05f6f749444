from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from daemon_harness import ticket
from dropforge.daemon import queue
from dropforge.daemon.queue import FOLDER_STATE, FOLDERS, TicketBook, put, read, ticket_path
from dropforge.errors import EnvironmentFault
from dropforge.paths import TICKET_FOLDERS, DataRoot
from dropforge.states import State


def test_a_ticket_survives_the_disk(root: DataRoot) -> None:
    original = ticket(gpus="all", time_limit=3.5, retried_after=2)
    put(root, "queue", original)
    assert read(ticket_path(root, "queue", original.id)) == original


@pytest.mark.parametrize(
    "content", ["", "not json", "[]", "{}", '{"schema": 2}', '{"schema": 1, "id": "x"}', "\ud800"],
)  # fmt: skip
def test_what_is_not_a_ticket_is_not_read_as_one(root: DataRoot, content: str) -> None:
    path = ticket_path(root, "queue", "x")
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert read(path) is None
    assert read(path.with_name("absent.json")) is None


def test_a_ticket_under_a_wrong_name_or_with_wrong_types_is_not_read(root: DataRoot) -> None:
    put(root, "queue", ticket())
    path = ticket_path(root, "queue", ticket().id)
    assert read(path.rename(path.with_name("other.json"))) is None
    put(root, "queue", ticket(priority="high"))
    assert read(path) is None


def test_moving_is_one_rename_to_the_place_of_the_state(root: DataRoot) -> None:
    for state, folder in TICKET_FOLDERS.items():
        put(root, "queue", ticket())
        inode = ticket_path(root, "queue", ticket().id).stat().st_ino
        assert queue.move(root, ticket().id, source="queue", state=state) == folder
        moved = ticket_path(root, folder, ticket().id)
        assert moved.stat().st_ino == inode
        moved.unlink()


def test_every_folder_has_a_state_that_belongs_there() -> None:
    assert set(FOLDERS) == set(FOLDER_STATE)
    for folder, state in FOLDER_STATE.items():
        assert TICKET_FOLDERS[state] == folder


def test_a_split_data_root_is_explained(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_mount(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    put(root, "queue", ticket())
    monkeypatch.setattr(Path, "rename", other_mount)
    with pytest.raises(EnvironmentFault) as caught:
        queue.move(root, ticket().id, source="queue", state=State.HELD)
    assert caught.value.code == "data-root-split"


def test_the_book_follows_what_people_do_by_hand(root: DataRoot) -> None:
    book = TicketBook(root)
    for number in (1, 2, 3):
        put(root, "queue", ticket(number))
    assert book.refresh() == []
    assert [t.seq for t in book.tickets("queue")] == [1, 2, 3]
    ticket_path(root, "queue", ticket(1).id).unlink()
    ticket_path(root, "queue", ticket(2).id).rename(ticket_path(root, "held", ticket(2).id))
    assert sorted(book.refresh()) == [ticket(1).id, ticket(2).id]
    assert book.folder_of(ticket(2).id) == "held"
    assert book.folder_of(ticket(1).id) is None


def test_the_book_finds_equal_content_among_live_jobs_only(root: DataRoot) -> None:
    book = TicketBook(root)
    put(root, "held", ticket(1))
    put(root, "done", ticket(2))
    put(root, "queue", ticket(3, digest=""))
    book.refresh()
    assert book.with_digest("digest-1") == ticket(1)
    assert book.with_digest("digest-2") is None
    assert book.with_digest("") is None


def test_the_book_moves_and_changes_on_disk_and_in_memory(root: DataRoot) -> None:
    book = TicketBook(root)
    put(root, "queue", ticket())
    book.refresh()
    book.replace(ticket(), folder="queue", priority=90)
    book.move(ticket().id, source="queue", state=State.PREPARING)
    assert [t.priority for t in book.tickets("running")] == [90]
    fresh = TicketBook(root)
    fresh.refresh()
    assert fresh.tickets("running") == book.tickets("running")
