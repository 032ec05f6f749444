"""From a settled file to one ticket or one rejection. Time is passed in; nothing sleeps."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from daemon_harness import drop, places, spec_text
from dropforge.daemon import intake, sequence
from dropforge.daemon import rejection as rejection_module
from dropforge.daemon.crash_points import ignore
from dropforge.daemon.intake import Intake
from dropforge.daemon.queue import TicketBook, all_tickets, read, ticket_path
from dropforge.daemon.watcher import SettleTracker, look
from dropforge.files import read_json
from dropforge.paths import DataRoot
from dropforge.spec_check import CheckedSpec, check, check_in_child
from dropforge.states import State


class Desk:
    """Intake and settling without the rest of the daemon."""

    def __init__(self, root: DataRoot, *, check_spec=check) -> None:
        self.root = root
        self.book = TicketBook(root)
        self.tracker = SettleTracker(root, settle_seconds=5)
        self.intake = Intake(root, self.book, check=check_spec, crash=ignore)

    def look(self, now: float) -> list[str]:
        """Ids accepted in this look."""
        ready = self.tracker.update(look(self.root), now=now)
        return [job_id for item in ready if (job_id := self.intake.take(item, now=now)) is not None]

    def settle(self) -> list[str]:
        """Long enough for everything: settling, and the patience with unfinished files."""
        return [job_id for now in (0.0, 5.0, 70.0) for job_id in self.look(now)]


@pytest.fixture
def desk(root: DataRoot) -> Desk:
    return Desk(root)


def rejection(root: DataRoot) -> tuple[Path, str, dict]:
    """Folder, ERROR.txt and error.json of the only rejection."""
    (folder,) = root.rejected.iterdir()
    return folder, (folder / "ERROR.txt").read_text(), read_json(folder / "error.json")


def test_a_good_file_becomes_exactly_one_ticket(root: DataRoot, desk: Desk) -> None:
    path = drop(root, "My Job.yaml", spec_text("Support Bot", extra="resources: {priority: 70, time_limit: 2h}\n"))
    raw = path.read_bytes()
    assert desk.look(0.0) == []
    (job_id,) = desk.look(5.0)
    assert job_id.startswith("000001-support-bot-")
    ticket = read(ticket_path(root, "queue", job_id))
    assert ticket is not None
    assert (ticket.name, ticket.priority, ticket.time_limit, ticket.file) == ("Support Bot", 70, 7200.0, "My Job.yaml")
    run = root.run(job_id)
    assert run.spec_original.read_bytes() == raw
    assert check(run.spec_resolved.read_bytes(), filename="spec.resolved.yaml").spec.train.learning_rate == 2e-4
    assert read_json(run.status)["state"] == State.QUEUED
    assert list(root.inbox.glob("*.yaml")) == []
    assert desk.look(6.0) == []


@pytest.mark.parametrize("text", [spec_text(), spec_text(extra="nonsense: 1\n")], ids=["good", "bad"])
def test_a_file_that_is_written_again_after_it_settled_settles_again(root: DataRoot, desk: Desk, text: str) -> None:
    """A copy over it has begun between the look and the taking, which a flood holds up: half of it may be a good spec."""
    path = drop(root, "a.yaml", text)
    desk.look(0.0)
    (ready,) = desk.tracker.update(look(root), now=5.0)
    path.write_text(spec_text("other"))
    assert desk.intake.take(ready, now=5.0) is None
    assert path.exists() and places(root) == {} and not any(root.rejected.iterdir())
    assert desk.look(6.0) == [], "it was seen for the first time"
    (job_id,) = desk.look(11.0)
    assert "other" in job_id


def test_a_refused_file_that_is_mended_before_it_is_moved_becomes_a_job(root: DataRoot, desk: Desk) -> None:
    path = drop(root, "a.yaml", spec_text(extra="nonsense: 1\n"))
    desk.look(0.0)
    (ready,) = desk.tracker.update(look(root), now=5.0)
    desk.intake.consider(ready, now=5.0)
    assert desk.intake.is_refused(ready)
    path.write_text(spec_text("mended"))
    desk.intake.reject(ready)
    assert path.exists() and not any(root.rejected.iterdir())
    desk.look(6.0)
    assert len(desk.look(11.0)) == 1


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_disk_that_is_full_when_the_ticket_is_written_gives_the_file_back(
    root: DataRoot, desk: Desk, monkeypatch: pytest.MonkeyPatch, as_folder: bool
) -> None:
    """The file has left the inbox by then; it must not wait in queue/ for the next start of the daemon."""
    name = "a.job" if as_folder else "a.yaml"
    (root.inbox / "a.job").mkdir() if as_folder else None
    path = drop(root, "a.job/job.yaml" if as_folder else name)
    raw, real = path.read_bytes(), intake.put
    desk.look(0.0)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(intake, "put", full)
    with pytest.raises(OSError, match="No space"):
        desk.look(5.0)
    assert path.read_bytes() == raw
    assert [*(root.path / "queue").iterdir(), *(root.path / "runs").iterdir()] == []
    monkeypatch.setattr(intake, "put", real)
    assert len(desk.look(6.0)) == 1


def test_a_disk_that_is_full_during_a_rejection_leaves_no_half_of_it(
    root: DataRoot, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = drop(root, "a.yaml", spec_text(extra="nonsense: 1\n")), rejection_module.rename

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    desk.look(0.0)
    monkeypatch.setattr(rejection_module, "rename", full)
    with pytest.raises(OSError, match="No space"):
        desk.look(5.0)
    assert path.exists() and not any(root.rejected.iterdir())
    monkeypatch.setattr(rejection_module, "rename", real)
    desk.look(6.0)
    assert rejection(root)[0].name.startswith("000002-")


def test_numbers_go_up_and_are_never_given_twice_whatever_is_lost(root: DataRoot) -> None:
    first = sequence.Sequence(root)
    first.expect(5)
    assert [first.take() for _ in range(3)] == [1, 2, 3]
    second = sequence.Sequence(root)  # the daemon was killed
    assert second.take() == 6, "what was persisted is not given again"
    (root.state / "sequence").unlink()
    assert second.take() == 1, "nothing is in use"
    (root.path / "runs" / "000041-x-00000000").mkdir()
    (root.state / "sequence").write_text("damaged")
    assert sequence.Sequence(root).take() == 42
    first.expect(10_000)
    assert [first.take() for _ in range(3)] == [4, 5, 43], "its own first, then after what others took"
    assert int((root.state / "sequence").read_text()) == 42 + sequence.AT_ONCE


def test_a_half_copied_file_waits_and_is_then_rejected(root: DataRoot, desk: Desk) -> None:
    whole = spec_text()
    path = drop(root, "half.yaml", whole[: whole.index("export")])
    for now in (0.0, 5.0, 30.0, 59.0):
        assert desk.look(now) == []
        assert path.exists()
    assert [item.name for item in desk.intake.unfinished] == ["half.yaml"]
    assert desk.look(60.0) == []
    folder, text, error = rejection(root)
    assert (folder / "half.yaml").read_text() == whole[: whole.index("export")]
    assert "export" in text
    assert error["problems"][0]["code"] == "spec-missing-key"
    assert desk.intake.unfinished == []


def test_a_half_copied_file_that_is_finished_in_time_becomes_a_job(root: DataRoot, desk: Desk) -> None:
    path = drop(root, "half.yaml", "version: 1\nname: [")
    desk.look(0.0)
    desk.look(20.0)
    path.write_text(spec_text())
    desk.look(50.0)
    assert len(desk.look(55.0)) == 1
    assert list(root.rejected.iterdir()) == []


def test_patience_starts_again_with_every_change(root: DataRoot, desk: Desk) -> None:
    path = drop(root, "half.yaml", "version: 1\n")
    desk.look(0.0)
    desk.look(50.0)
    path.write_text("version: 1\nname: x\n")
    desk.look(55.0)
    desk.look(80.0)
    assert path.exists()
    desk.look(115.0)
    assert not path.exists()


def test_a_definite_fault_is_rejected_at_once_with_what_where_why_and_what_to_do(root: DataRoot, desk: Desk) -> None:
    drop(root, "typo.yaml", spec_text(extra="train: {learnin_rate: 1e-4}\n"))
    desk.look(0.0)
    desk.look(5.0)
    folder, text, error = rejection(root)
    assert "learnin_rate" in text
    assert "line 5" in text
    assert "learning_rate" in text  # the nearest key
    assert "typo.yaml" in text
    assert "What to do" in text
    assert error["reason"] == "invalid_spec"
    assert folder.name == error["id"]


def test_every_problem_is_listed(root: DataRoot, desk: Desk) -> None:
    drop(root, "two.yaml", spec_text(extra="nonsense: 1\ntrain: {seed: text}\n"))
    desk.settle()
    _, text, error = rejection(root)
    assert len(error["problems"]) == 2
    assert "2 things are wrong" in text


BAD_BYTES = {
    "junk": os.urandom(300).replace(b"\n", b"") + b"\x00",
    "latin1": spec_text().replace("job", "jöb").encode("latin-1"),
    "utf16": spec_text().encode("utf-16"),
    "duplicate key": (spec_text() + "name: again\n").encode(),
    "alias bomb": b"a: &a [1,1]\nb: &b [*a,*a]\nversion: 1\n",
    "nesting": b"[" * 5000,
    "tag": b"version: !!python/object/apply:os.system ['true']\n",
    "two documents": spec_text().encode() + b"---\n" + spec_text().encode(),
    "nul": b"version: 1\nname: a\x00b\n",
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_bytes_are_rejected_and_kept(root: DataRoot, desk: Desk, case: str) -> None:
    (root.inbox / "bad.yaml").write_bytes(BAD_BYTES[case])
    assert desk.settle() == []
    folder, text, error = rejection(root)
    assert (folder / "bad.yaml").read_bytes() == BAD_BYTES[case]
    assert text
    assert error["problems"][0]["code"].startswith("spec-")
    assert not (root.inbox / "bad.yaml").exists()


def test_the_limited_child_rejects_the_same(root: DataRoot) -> None:
    desk = Desk(root, check_spec=check_in_child)
    (root.inbox / "nested.json").write_bytes(b"[" * 200_000)
    drop(root, "good.yaml")
    assert len(desk.settle()) == 1
    folder, _, _ = rejection(root)
    assert (folder / "nested.json").exists()


def make_symlink(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def make_dangling_symlink(path: Path) -> None:
    path.symlink_to("/nowhere")


def make_hard_link(path: Path) -> None:
    other = path.parent.parent / "other.yaml"
    other.write_text(spec_text())
    os.link(other, path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)
        server.bind(path.name)


def make_huge(path: Path) -> None:
    path.write_text("# " + "x" * 262_143)


def make_folder(path: Path) -> None:
    path.mkdir()


NOT_FILES = {
    "symlink": (make_symlink, "a.yaml", "inbox-not-a-file"),
    "dangling symlink": (make_dangling_symlink, "a.yaml", "inbox-not-a-file"),
    "FIFO": (os.mkfifo, "a.yaml", "inbox-not-a-file"),
    "socket": (make_socket, "a.yaml", "inbox-not-a-file"),
    "hard link": (make_hard_link, "a.yaml", "inbox-hard-link"),
    "empty": (Path.touch, "a.yaml", "inbox-empty"),
    "too large": (make_huge, "a.yaml", "inbox-too-large"),
    "data file": (lambda path: path.write_text("{}\n"), "rows.jsonl", "inbox-not-a-spec"),
    "folder without .job": (make_folder, "folder", "inbox-not-a-job-folder"),
    "folder named like a spec": (make_folder, "a.yaml", "inbox-not-a-job-folder"),
    "job folder without a spec": (make_folder, "a.job", "inbox-no-spec"),
    "link to a folder": (lambda path: path.symlink_to("/etc"), "a.job", "inbox-not-a-file"),
}


@pytest.mark.parametrize("case", NOT_FILES)
def test_what_is_not_a_plain_small_file_is_refused_and_kept(root: DataRoot, desk: Desk, case, monkeypatch) -> None:
    make, name, code = NOT_FILES[case]
    monkeypatch.chdir(root.path)
    make(root.inbox / name)
    kind = (root.inbox / name).lstat().st_mode
    assert desk.settle() == []
    folder, text, error = rejection(root)
    assert error["problems"][0]["code"] == code, text
    assert (folder / name).lstat().st_mode == kind
    assert error["problems"][0]["fix"]


def test_a_file_that_carries_the_name_of_our_own_is_kept_beside_it(root: DataRoot, desk: Desk) -> None:
    drop(root, "error.json", '{"not": "a spec"}')
    desk.settle()
    folder, text, error = rejection(root)
    assert error["problems"]
    assert (folder / "file" / "error.json").read_text() == '{"not": "a spec"}'
    assert "error.json" in text


@pytest.mark.parametrize(
    "raw", [b"new\nline.yaml", b"\x1b[31mred.yaml", b"-rf.yaml", b"bad\xff.yaml", b"$(touch x);`id`.yaml", b"a|b<c>.yaml",
            b"x" * 250 + b".yaml", "rtl\u202egnp.yaml".encode()],
)  # fmt: skip
@pytest.mark.parametrize("good", [True, False])
def test_hostile_names_are_harmless(root: DataRoot, desk: Desk, raw: bytes, good: bool) -> None:
    name = os.fsdecode(raw)
    drop(root, name, spec_text() if good else "nonsense: 1")
    accepted = desk.settle()
    if good:
        assert len(accepted) == 1
        assert read_json(root.run(accepted[0]).path / "ticket.json")
    else:
        folder, text, error = rejection(root)
        assert (folder / name).exists()
        assert "\x1b" not in text + error["file"]
        assert "\n" not in error["file"]


def test_identical_bytes_are_rejected_while_the_job_lives_and_run_again_after_it(root: DataRoot, desk: Desk) -> None:
    drop(root, "a.yaml")
    (first,) = desk.settle()
    drop(root, "b.yaml")
    assert desk.settle() == []
    folder, text, error = rejection(root)
    assert first in text
    assert error["reason"] == "duplicate"
    assert (folder / "b.yaml").exists()
    for state in (State.PREPARING, State.SUCCEEDED):
        desk.book.move(first, source=desk.book.folder_of(first), state=state)
    drop(root, "c.yaml")
    (second,) = desk.settle()
    assert second != first


def test_rerun_and_a_changed_byte_override_the_duplicate_rule(root: DataRoot, desk: Desk) -> None:
    text = spec_text(extra="rerun: true\n")
    for name in ("a.yaml", "b.yaml"):
        drop(root, name, text)
    drop(root, "c.yaml", spec_text())
    drop(root, "d.yaml", spec_text() + "\n")
    ids = desk.settle()
    assert len(set(ids)) == 4
    assert [job_id[:6] for job_id in ids] == ["000001", "000002", "000003", "000004"]


def test_numbers_are_never_given_twice(root: DataRoot, desk: Desk) -> None:
    drop(root, "a.yaml")
    desk.settle()
    (root.state / "sequence").write_text("damaged")
    drop(root, "b.yaml", spec_text("other"))
    (second,) = Desk(root).settle()
    assert second.startswith("000002-other-")


def test_a_file_changed_between_check_and_claim_goes_back(root: DataRoot) -> None:
    path = root.inbox / "a.yaml"

    def check_then_change(raw: bytes, *, filename: str) -> CheckedSpec:
        checked = check(raw, filename=filename)
        if b"first" in raw:
            path.write_text(spec_text("second"))
        return checked

    desk = Desk(root, check_spec=check_then_change)
    drop(root, "a.yaml", spec_text("first"))
    desk.look(0.0)
    assert desk.look(5.0) == []
    assert path.read_text() == spec_text("second")
    assert list(all_tickets(root)) == []
    assert list((root.path / "runs").iterdir()) == []
    desk.look(6.0)
    (job_id,) = desk.look(11.0)
    assert "-second-" in job_id


def test_a_file_taken_back_during_the_check_is_no_job(root: DataRoot) -> None:
    def check_then_remove(raw: bytes, *, filename: str) -> CheckedSpec:
        (root.inbox / "a.yaml").unlink()
        return check(raw, filename=filename)

    desk = Desk(root, check_spec=check_then_remove)
    drop(root, "a.yaml")
    assert desk.settle() == []
    assert places(root) == {}
    assert list((root.path / "runs").iterdir()) == []


def test_missing_data_may_follow_within_a_minute(root: DataRoot, desk: Desk) -> None:
    drop(root, "a.yaml", spec_text().replace("rows.jsonl", "later.jsonl"))
    desk.look(0.0)
    assert desk.look(5.0) == []
    (root.datasets / "later.jsonl").write_text("{}\n")
    assert desk.look(30.0) == []  # not looked at again before it changes or its time is up
    assert len(desk.look(60.0)) == 1


def test_data_that_never_comes_is_a_rejection_that_says_where_to_put_it(root: DataRoot, desk: Desk) -> None:
    drop(root, "a.yaml", spec_text().replace("rows.jsonl", "never.jsonl"))
    assert desk.settle() == []
    _, text, error = rejection(root)
    assert error["reason"] == "missing_input"
    assert "never.jsonl" in text
    assert "datasets/" in text


def test_a_hub_data_set_is_not_looked_for_on_disk(root: DataRoot, desk: Desk) -> None:
    drop(root, "a.yaml", spec_text().replace("rows.jsonl", "yahma/alpaca-cleaned"))
    assert len(desk.settle()) == 1


@pytest.mark.parametrize("path", ["/etc/passwd", "../../secret.jsonl", "link.jsonl"])
def test_data_outside_the_data_root_is_refused(root: DataRoot, desk: Desk, path: str) -> None:
    (root.datasets / "link.jsonl").symlink_to("/etc/passwd")
    drop(root, "a.yaml", spec_text().replace("rows.jsonl", path))
    assert desk.settle() == []
    rejection(root)


def make_job_folder(root: DataRoot, name: str = "bot.job") -> Path:
    folder = root.inbox / name
    folder.mkdir()
    (folder / "job.yaml").write_text(spec_text("bot").replace("rows.jsonl", "own.csv"))
    (folder / "own.csv").write_text("question,answer\na,b\n")
    return folder


def test_a_job_folder_brings_its_data(root: DataRoot, desk: Desk) -> None:
    make_job_folder(root)
    (job_id,) = desk.settle()
    assert (root.run(job_id).job_data / "own.csv").read_text().startswith("question")
    assert list(root.inbox.glob("*.job")) == []


def test_job_folders_are_duplicates_only_with_equal_data(root: DataRoot, desk: Desk) -> None:
    make_job_folder(root, "one.job")
    desk.settle()
    (make_job_folder(root, "two.job") / "own.csv").write_text("question,answer\na,OTHER\n")
    assert len(desk.settle()) == 1
    make_job_folder(root, "three.job")
    assert desk.settle() == []
    assert rejection(root)[2]["reason"] == "duplicate"


def test_links_inside_a_job_folder_are_refused(root: DataRoot, desk: Desk) -> None:
    folder = make_job_folder(root)
    (folder / "own.csv").unlink()
    (folder / "own.csv").symlink_to("/etc/passwd")
    assert desk.settle() == []
    assert rejection(root)[2]["problems"][0]["code"] == "inbox-link-inside"


def test_a_job_folder_changed_during_the_claim_goes_back(root: DataRoot) -> None:
    def check_then_change(raw: bytes, *, filename: str) -> CheckedSpec:
        own = root.inbox / "bot.job" / "own.csv"
        if own.exists() and "late" not in own.read_text():
            own.write_text("question,answer\nlate,row\n")
        return check(raw, filename=filename)

    desk = Desk(root, check_spec=check_then_change)
    make_job_folder(root)
    desk.look(0.0)
    assert desk.look(5.0) == []
    assert (root.inbox / "bot.job" / "own.csv").exists()
    desk.look(6.0)
    assert len(desk.look(11.0)) == 1


@pytest.mark.parametrize("kind", ["yaml", "json", "toml"])
def test_truncation_at_every_tenth_byte_is_never_a_crash_and_never_loses_the_file(tmp_path: Path, kind: str) -> None:
    whole = {
        "yaml": spec_text(),
        "json": '{"version": 1, "name": "job", "model": "builtin:tiny-llama", "data": "rows.jsonl", "export": ["adapter"]}',
        "toml": 'version = 1\nname = "job"\nmodel = "builtin:tiny-llama"\ndata = "rows.jsonl"\nexport = ["adapter"]\n',
    }[kind]
    for cut in range(1, len(whole), 10):
        root = DataRoot(tmp_path / str(cut)).create()
        (root.datasets / "rows.jsonl").write_text("{}\n")
        drop(root, f"cut.{kind}", whole[:cut])
        accepted = Desk(root).settle()
        # Only a cut that leaves every required key may become a job.
        assert len(accepted) + len(list(root.rejected.iterdir())) == 1
        assert not accepted or "export" in whole[:cut]
