"""Carries out what people ask in control/, and what they say by deleting a queued ticket."""

from __future__ import annotations

import logging

from dropforge.daemon.control import Action, Request, pending
from dropforge.daemon.crash_points import CrashHook
from dropforge.daemon.names import printable
from dropforge.daemon.queue import Ticket, TicketBook, find
from dropforge.daemon.transitions import Transitions
from dropforge.daemon.worker import Worker
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from dropforge.states import State

log = logging.getLogger("dropforge.daemon")


class Orders:
    """The arm of control/."""

    def __init__(
        self, root: DataRoot, book: TicketBook, transitions: Transitions, worker: Worker, *, crash: CrashHook
    ) -> None:
        self._root = root
        self._book = book
        self._transitions = transitions
        self._worker = worker
        self._crash = crash

    def refresh(self) -> None:
        """Bring the book up to date; a queued ticket that is nowhere any more was deleted, which cancels its job."""
        for job_id in self._book.refresh():
            if find(self._root, job_id) is None and self._transitions.cancel_deleted(job_id):
                log.info("%s: its ticket was deleted, so it is cancelled", job_id, extra={"action": "deleted"})

    def obey(self, *, now: float) -> None:
        """Do every request; the file is removed when it is done, so a crash in between does it again."""
        requests, meaningless = pending(self._root)
        for path in meaningless:
            log.warning("control/%s means nothing here", printable(path.name), extra={"action": "control-unknown"})
            if not path.is_dir():
                path.unlink()
        for request in requests:
            if self._do(request, now=now):
                self._crash("control.done")
                request.path.unlink(missing_ok=True)

    def _do(self, request: Request, *, now: float) -> bool:
        """True when the request is dealt with; a cancel stays in control/ until the running job has ended."""
        found = find(self._root, request.job_id)
        if found is None or found[0] not in request.action.folders:
            return True  # it ended in the meantime, or somebody asked for the impossible by hand
        folder, ticket = found
        if request.action is Action.CANCEL and folder == "running":
            self._worker.ask_to_stop(ticket.id, Reason.USER, now=now)
            return False
        log.info("%s: %s", ticket.id, request.action, extra={"action": "control"})
        self._do_at_once(request, ticket, folder)
        return True

    def _do_at_once(self, request: Request, ticket: Ticket, folder: str) -> None:
        if request.action is Action.CANCEL:
            self._transitions.enter(ticket, State.CANCELLED, source=folder, reason=Reason.USER, message="cancelled")
        elif request.action is Action.CHECKPOINT:
            self._worker.ask_for_checkpoint(ticket.id)
        elif request.action is Action.PRIORITY:
            self._book.replace(ticket, folder=folder, priority=request.number)
        else:
            self._transitions.queue_again(ticket, source=folder)
            self._book.refresh()
