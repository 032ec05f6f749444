"""At start-up: every job that a crash, a kill or a power cut left in between is completed or put back.

After this, each dropped file is in the inbox, in rejected/, or has exactly one ticket, and no ticket lies in running/.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable

from dropforge.daemon import attempts, intake, lease, process
from dropforge.daemon.attempts import AttemptEnd
from dropforge.daemon.queue import FOLDERS, Ticket, TicketBook, ids_in, put, read, state_in, ticket_path
from dropforge.daemon.rejection import remove_unfinished
from dropforge.daemon.transitions import Transitions, open_log
from dropforge.daemon.verdict import explain_death
from dropforge.daemon.watcher import READY_SUFFIX
from dropforge.files import TEMPORARY_PREFIX
from dropforge.paths import DataRoot, RunFolder
from dropforge.states import State

log = logging.getLogger("dropforge.daemon")


def recover(
    root: DataRoot, book: TicketBook, transitions: Transitions, *, grace_seconds: float,
    wait: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Bring the data root into order. `wait` sleeps while a runner of the dead daemon saves its checkpoint."""
    _remove_temporaries(root)
    for name in remove_unfinished(root):
        log.info("rejection %s undone: its file is still in the inbox", name, extra={"action": "recover-rejection"})
    for job_id in ids_in(root, "queue"):
        _complete_claim(root, job_id)
    _adopt_run_folders(root, transitions)
    book.refresh()
    for ticket in book.tickets("running"):
        _close_running(root, ticket, transitions, grace_seconds=grace_seconds, wait=wait)
    for folder in ("queue", "held"):
        for ticket in book.tickets(folder):
            _agree_with_place(root.run(ticket.id), ticket, folder)


def _remove_temporaries(root: DataRoot) -> None:
    """What was being written when the power went. Whole files are never named like this."""
    for name in (*FOLDERS, "control", "state"):
        for leftover in (root.path / name).glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink()
    for marker in root.staging.glob(f"*{READY_SUFFIX}"):
        name = marker.name.removesuffix(READY_SUFFIX)
        # In this order: a submit that is just renaming is found at one of the two places.
        if not os.path.lexists(root.staging / name) and not os.path.lexists(root.inbox / name):
            marker.unlink()


def _complete_claim(root: DataRoot, job_id: str) -> None:
    """A file that was renamed into queue/ but is not a ticket yet: finish, or give it back if it was changed."""
    if read(ticket_path(root, "queue", job_id)) is not None:
        return
    run = root.run(job_id)
    ticket = intake.ticket_copy(run)
    if ticket is None:
        log.warning("queue/%s.json is not a ticket and is left alone", job_id, extra={"action": "recover-foreign"})
    elif intake.unchanged(root, ticket, run):
        put(root, "queue", ticket)
    else:
        intake.give_back(root, ticket, run)


def _adopt_run_folders(root: DataRoot, transitions: Transitions) -> None:
    """Run folders without any ticket: a claim that was cut off before or after its commit, or a deleted ticket."""
    known = {job_id for folder in FOLDERS for job_id in ids_in(root, folder)}
    for path in sorted((root.path / "runs").iterdir()):
        run = RunFolder(path)
        if path.name in known or not path.is_dir() or path.is_symlink():
            continue
        ticket = intake.ticket_copy(run)
        if run.status.exists() and ticket is not None:
            transitions.cancel_deleted(path.name)  # it was accepted once, so a person deleted its ticket
        elif ticket is not None and run.job_data.is_dir():
            if intake.unchanged(root, ticket, run):
                put(root, "queue", ticket)
            else:
                intake.give_back(root, ticket, run)
        elif not run.status.exists() and not attempts.numbers(run):
            shutil.rmtree(path)  # the dropped file never left the inbox


def _close_running(
    root: DataRoot, ticket: Ticket, transitions: Transitions, *, grace_seconds: float, wait: Callable[[float], None]
) -> None:
    run = root.run(ticket.id)
    known = attempts.numbers(run)
    if not known or not attempts.started(run, known[-1]):
        transitions.enter(ticket, State.QUEUED, source="running", message="accepted")
        return
    number = known[-1]
    _end_old_runner(run, grace_seconds=grace_seconds, wait=wait)
    end = attempts.read_end(run, number)
    if end is None:
        reason, message = explain_death(None, out_of_memory=False)
        end = AttemptEnd(state=State.INTERRUPTED, reason=reason, message=message, died=True, with_daemon=True,
                         progress=attempts.progress(run))  # fmt: skip
        attempts.write_end(run, number, end)
    verdict = transitions.finish(ticket, number, end)
    log.info("%s was running: now %s", ticket.id, verdict.state, extra={"action": "recover-running"})


def _end_old_runner(run: RunFolder, *, grace_seconds: float, wait: Callable[[float], None]) -> None:
    """The runner of the dead daemon has been told to save and end; wait for it, then end what is left."""
    old = lease.holder(run)
    if old is None or not old.alive():
        return
    process.kill(old.pid, signal.SIGTERM)
    waited = 0.0
    while old.alive() and waited < grace_seconds:
        wait(0.1)
        waited += 0.1
    if old.alive():
        process.kill_family(old.pid)


def _agree_with_place(run: RunFolder, ticket: Ticket, folder: str) -> None:
    """status.json must not contradict the place of the ticket; the place wins."""
    if not run.path.is_dir():
        return
    written = open_log(run).fields.get("state")
    if state_in(folder, written) is not None:
        return
    if folder == "queue" and written is None:
        intake.announce(run, ticket)
    else:
        state = State.QUEUED if folder == "queue" else State.HELD
        open_log(run).state(state, message=f"found in {folder}/ at start-up")
