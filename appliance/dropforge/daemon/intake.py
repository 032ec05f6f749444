"""From a settled file to exactly one ticket, or to rejected/ with the reason.

Order of a claim (each line durable before the next; a crash at any point is completed or undone by recover.py):
    take a sequence number
    runs/<id>/  spec.orig, spec.resolved.yaml, ticket.json
    rename the dropped file to queue/<id>.json  (a folder: to runs/<id>/data)       <- the commit
    read it again: the same bytes, or it goes back to the inbox
    replace queue/<id>.json by the ticket           (which makes the rename of a file durable as well)
    status.json says queued
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dropforge.daemon import sequence
from dropforge.daemon.candidate import Candidate, read_candidate, read_regular, shown_name
from dropforge.daemon.crash_points import CrashHook
from dropforge.daemon.folder_sync import FolderSync
from dropforge.daemon.names import JOB_FOLDER_SUFFIX, is_ignored, is_spec_file, printable, slug
from dropforge.daemon.queue import Ticket, TicketBook, put, read, rename, rename_lightly, ticket_path
from dropforge.daemon.rejection import reject
from dropforge.daemon.spec_batch import CheckSpec, SpecChecker
from dropforge.daemon.watcher import Fingerprint, Ready, clear_mark, fingerprint
from dropforge.errors import DataError, DropforgeError, InputError, Reason, SpecError
from dropforge.events import RunLog, utc_now
from dropforge.files import as_json, fill_new_folder, fsync_file, fsync_folder, read_json, sha256_bytes
from dropforge.locate import data_locator
from dropforge.paths import DataRoot, RunFolder
from dropforge.spec import SourceSpec, Spec
from dropforge.spec_check import CheckedSpec, check_in_child, to_yaml
from dropforge.states import State

UNFINISHED_SECONDS = 60.0
"""How long after its last change a file that does not parse may still be one that is being written."""
_UNFINISHED_CODES = frozenset({"spec-syntax", "spec-empty", "spec-encoding", "spec-missing-key", "spec-not-a-mapping",
                               "data-missing", "inbox-empty", "inbox-no-spec"})  # fmt: skip
"""Problems that a file has while it is only half there (or its data is still on the way)."""

TICKET_COPY = "ticket.json"


@dataclass(frozen=True)
class Unfinished:
    """A file left in the inbox because it may still be growing."""

    name: str
    error: DropforgeError
    until: float
    """Monotonic time at which it will be rejected."""


class Intake:
    """Turns finished entries of the inbox into tickets."""

    def __init__(
        self, root: DataRoot, book: TicketBook, *, check: CheckSpec = check_in_child, crash: CrashHook
    ) -> None:
        self._root = root
        self._book = book
        self._checker = SpecChecker(check)
        self._crash = crash
        self._unfinished: dict[str, tuple[Ready, Unfinished]] = {}
        self._refused: dict[str, tuple[Ready, InputError]] = {}
        self._durable = FolderSync()
        self._sequence = sequence.Sequence(root)

    @property
    def unfinished(self) -> list[Unfinished]:
        return [item for _, item in self._unfinished.values()]

    def forget_all_but(self, names: set[str]) -> None:
        self._durable.forget_all_but(names)
        for known in (self._unfinished, self._refused):
            for name in set(known) - names:
                del known[name]

    def take(self, ready: Ready, *, now: float) -> str | None:
        """Accept or reject one entry. Returns the id of its ticket, None when it was rejected or must wait."""
        job_id = self.consider(ready, now=now)
        if self.is_refused(ready):
            self.reject(ready)
        return job_id

    def get_ready(self, files: int) -> None:
        """So many files will be asked for soon."""
        if files > 1:
            self._checker.get_ready()
        else:
            self._checker.close()

    def check_ahead(self, entries: Sequence[Ready]) -> int:
        """Check the specs of many entries in one child; `consider` then finds the verdicts.

        Returns for how many of them, from the first; for the others there was no time.
        """
        self._sequence.expect(len(entries))
        specs, numbers = [], []
        for number, entry in enumerate(entries):
            try:
                if is_spec_file(entry.name):
                    specs.append((read_regular(self._root.inbox / entry.name), shown_name(entry.name)))
                    numbers.append(number)
            except (OSError, InputError):
                continue  # `consider` will meet the same and say so
        checked = self._checker.ahead(specs)
        return numbers[checked] if checked < len(specs) else len(entries)

    def waits(self, ready: Ready, *, now: float) -> bool:
        """True for an entry that was considered as it is now, and found unfinished or to be rejected."""
        known = self._unfinished.get(ready.name)
        unfinished = known is not None and known[0].fingerprint == ready.fingerprint and now < known[1].until
        return unfinished or self.is_refused(ready)

    def is_refused(self, ready: Ready) -> bool:
        refused = self._refused.get(ready.name)
        return refused is not None and refused[0].fingerprint == ready.fingerprint

    def consider(self, ready: Ready, *, now: float) -> str | None:
        """Accept one entry if it is good. None when it must wait, is gone, or is to be rejected (`is_refused`).

        Raises OSError when the disk does not let it: then the file is still in the inbox.
        """
        if self.waits(ready, now=now):
            return None
        path = self._root.inbox / ready.name
        if path.is_dir() and not path.is_symlink() and not self._durable.done(path, ready.fingerprint):
            return None
        candidate = None
        try:
            candidate = read_candidate(path)
            if not candidate.is_folder and fingerprint(path) != ready.fingerprint:
                return None  # written to since it settled, so it settles again (a folder is compared after the claim)
            checked = self._checker.check(candidate.raw, filename=candidate.shown_name)
            self._refuse_missing_data(checked.spec, candidate)
            self._refuse_duplicate(candidate, checked.spec)
        except FileNotFoundError:
            return None  # taken back, or replaced while it was read
        except InputError as error:
            self._refuse_or_wait(ready, error, now=now, torn=candidate is not None and candidate.ends_in_a_line)
            return None
        self._unfinished.pop(ready.name, None)
        return self._claim(candidate, checked, ready)

    def _refuse_or_wait(self, ready: Ready, error: InputError, *, now: float, torn: bool) -> None:
        # Kept for a while: without the frames of its traceback, which would keep every list of a flood alive.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        until = ready.unchanged_since + UNFINISHED_SECONDS
        doubtful = torn or any(problem.code in _UNFINISHED_CODES for problem in error.problems)
        if doubtful and not ready.complete and now < until:
            self._unfinished[ready.name] = (ready, Unfinished(ready.name, error, until))
            return
        self._unfinished.pop(ready.name, None)
        self._refused[ready.name] = (ready, error)

    def reject(self, ready: Ready) -> None:
        """Move a refused entry to rejected/, unless it has changed since: then it settles and is considered again.

        Raises OSError as `consider` does.
        """
        _, error = self._refused[ready.name]
        if fingerprint(self._root.inbox / ready.name) != ready.fingerprint:
            del self._refused[ready.name]
            return
        number = self._sequence.take()
        digest = sha256_bytes(os.fsencode(ready.name))
        job_id = sequence.job_id(number, slug=slug(ready.name), digest=digest)
        reject(self._root, ready.name, error, job_id=job_id, crash=self._crash)
        del self._refused[ready.name]
        clear_mark(self._root, ready.name)

    def _refuse_missing_data(self, spec: Spec, candidate: Candidate) -> None:
        beside = candidate.path if candidate.is_folder else None
        locate = data_locator(self._root, beside=beside)
        for source in _sources(spec):
            try:
                locate(source.path)
            except DataError as error:
                if error.code == "data-missing" and _may_be_hub_id(source):
                    continue
                raise

    def _refuse_duplicate(self, candidate: Candidate, spec: Spec) -> None:
        other = self._book.with_digest(candidate.digest)
        if other is not None and not spec.rerun:
            raise SpecError(
                f"the same job is in {self._book.folder_of(other.id)}/ already", code="job-duplicate",
                where=f"inbox/{printable(candidate.path.name)}", why=f"job {other.id} came from identical bytes",
                fix="wait for that job, or write `rerun: true` (or change anything else) to run it twice",
                reason=Reason.DUPLICATE,
            )  # fmt: skip

    def _claim(self, candidate: Candidate, checked: CheckedSpec, ready: Ready) -> str | None:
        number = self._sequence.take()
        self._crash("intake.sequence-taken")
        spec = checked.spec
        ticket = Ticket(
            id=sequence.job_id(number, slug=spec.slug, digest=candidate.spec_digest), name=spec.name, slug=spec.slug,
            seq=number, file=printable(ready.name), digest=candidate.digest, priority=spec.resources.priority,
            gpus=spec.resources.gpus, time_limit=spec.resources.time_limit, accepted=utc_now(),
        )  # fmt: skip
        run = self._root.run(ticket.id)
        try:
            _make_run_folder(run, candidate, checked, ticket, ready.fingerprint)
            if not candidate.is_folder:
                fsync_file(candidate.path)  # nobody who copies a file waits for the disk
            self._crash("intake.run-folder-made")
            commit(self._root, candidate.path, ticket, is_folder=candidate.is_folder)
        except FileNotFoundError:
            shutil.rmtree(run.path)
            return None  # another daemon or the user took it first
        except BaseException:
            if os.path.lexists(candidate.path):
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        self._crash("intake.claimed")
        try:
            if not unchanged(self._root, ticket, run):
                give_back(self._root, ticket, run)
                return None
            put(self._root, "queue", ticket)
            fsync_folder(self._root.inbox)
        except OSError:
            if read(ticket_path(self._root, "queue", ticket.id)) is None:
                give_back(self._root, ticket, run)  # a full disk: it is tried again from the start
            raise
        self._crash("intake.ticket-written")
        announce(run, ticket)
        clear_mark(self._root, ready.name)
        self._book.add("queue", ticket)
        self._crash("intake.accepted")
        return ticket.id


def _make_run_folder(
    run: RunFolder, candidate: Candidate, checked: CheckedSpec, ticket: Ticket, settled: Fingerprint
) -> None:
    run.path.mkdir()
    (run.path / "attempts").mkdir()
    copy = {"ticket": ticket.as_json(), "folder": candidate.is_folder, "suffix": candidate.suffix,
            "fingerprint": settled.token}  # fmt: skip
    fill_new_folder(run.path, {
        run.spec_original.name: candidate.raw, run.spec_resolved.name: to_yaml(checked.resolved).encode("utf-8"),
        TICKET_COPY: as_json(copy),
    })  # fmt: skip
    fsync_folder(run.path.parent)


def ticket_copy(run: RunFolder) -> Ticket | None:
    """The ticket as it was accepted, kept in the run folder; None when it is missing or not readable."""
    try:
        ticket = Ticket.from_json(read_json(run.path / TICKET_COPY)["ticket"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return ticket if ticket.id == run.id else None


def commit(root: DataRoot, dropped: Path, ticket: Ticket, *, is_folder: bool) -> None:
    """The rename that makes the dropped file ours; for a file the ticket that replaces it makes it durable."""
    if is_folder:
        rename(dropped, root.run(ticket.id).job_data)
    else:
        rename_lightly(dropped, ticket_path(root, "queue", ticket.id))


def unchanged(root: DataRoot, ticket: Ticket, run: RunFolder) -> bool:
    """After the rename: is it still what was checked? A writer may have gone on in between."""
    copy = read_json(run.path / TICKET_COPY)
    if not copy["folder"]:
        return ticket_path(root, "queue", ticket.id).read_bytes() == run.spec_original.read_bytes()
    seen = fingerprint(run.job_data)
    return seen is not None and seen.token == copy["fingerprint"]


def give_back(root: DataRoot, ticket: Ticket, run: RunFolder) -> None:
    """Undo a claim: the file returns to the inbox, under its name if it can have it, and settles again."""
    copy = read_json(run.path / TICKET_COPY)
    source = run.job_data if copy["folder"] else ticket_path(root, "queue", ticket.id)
    name = ticket.file
    if name != printable(name) or "\\" in name or is_ignored(name) or os.path.lexists(root.inbox / name):
        name = f"{ticket.id}{JOB_FOLDER_SUFFIX if copy['folder'] else copy['suffix']}"
    rename(source, root.inbox / name)
    shutil.rmtree(run.path)


def announce(run: RunFolder, ticket: Ticket) -> None:
    """The first status.json of a job. Its existence means: accepted, completely."""
    log = RunLog(run)
    log.event("accepted", file=ticket.file, digest=ticket.digest)
    log.state(State.QUEUED, message="accepted", name=ticket.name, priority=ticket.priority, attempt=0,
              accepted=ticket.accepted)  # fmt: skip


def _sources(spec: Spec) -> list[SourceSpec]:
    return [*spec.data.train, *(spec.data.eval.sources if spec.data.eval else ())]


def _may_be_hub_id(source: SourceSpec) -> bool:
    """`org/name` without the ending of a data file may be a data set on the hub; the job finds out."""
    return source.path.count("/") == 1 and not source.path.lower().endswith(_DATA_SUFFIXES)


_DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".txt",
                  ".md", ".text", ".gz", ".zst", ".bz2", ".xz", ".zip", "/")  # fmt: skip
