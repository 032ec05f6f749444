"""Moving a job from one state to another: status.json first, then the ticket, which is what counts.

A crash between the two leaves the ticket where it was; what caused the transition (exit.json, a control file) is still
there, so it is done again.
"""

from __future__ import annotations

from typing import Any

from dropforge.daemon import attempts
from dropforge.daemon.attempts import AttemptEnd
from dropforge.daemon.crash_points import CrashHook
from dropforge.daemon.intake import ticket_copy
from dropforge.daemon.queue import Ticket, TicketBook, put
from dropforge.daemon.rejection import problem_text
from dropforge.daemon.verdict import Verdict, judge
from dropforge.errors import Reason
from dropforge.events import RunLog
from dropforge.files import write_text
from dropforge.paths import DataRoot, RunFolder
from dropforge.states import State


def open_log(run: RunFolder) -> RunLog:
    """The run's log; a status.json that is not readable (edited by hand, damaged disk) is put aside, not obeyed."""
    try:
        return RunLog(run)
    except (ValueError, TypeError):
        run.status.replace(run.path / "status.damaged.json")
        return RunLog(run)


class Transitions:
    """The only place that changes the state of a job that exists."""

    def __init__(self, root: DataRoot, book: TicketBook, *, crash: CrashHook) -> None:
        self._root = root
        self._book = book
        self._crash = crash

    def enter(
        self,
        ticket: Ticket,
        state: State,
        *,
        source: str,
        reason: Reason | None = None,
        message: str = "",
        **fields: Any,
    ) -> None:
        """Write status.json and move the ticket from folder `source` to where `state` belongs."""
        run = self._root.run(ticket.id)
        run.path.mkdir(parents=True, exist_ok=True)  # a ticket whose run folder somebody deleted still ends somewhere
        open_log(run).state(state, reason=reason.value if reason else None, message=message, **fields)
        self._crash("end.status-written")
        self._book.move(ticket.id, source=source, state=state)
        self._crash("end.ticket-moved")

    def finish(self, ticket: Ticket, attempt: int, end: AttemptEnd) -> Verdict:
        """After an attempt: end the job, put it back into the queue, or hold it."""
        run = self._root.run(ticket.id)
        history = attempts.ends(run, after=min(ticket.retried_after, attempt - 1)) or [end]
        verdict = judge(history, asked=attempts.read_stop(run, attempt))
        _explain(run, verdict, end)  # before the state that says it is there
        self.enter(
            ticket, verdict.state, source="running", reason=verdict.reason, message=verdict.message,
            problems=list(end.problems), waiting_for=None,
        )  # fmt: skip
        return verdict

    def queue_again(self, ticket: Ticket, *, source: str) -> None:
        """A person asked for another try: earlier attempts no longer count against the job."""
        known = attempts.numbers(self._root.run(ticket.id))
        fresh = self._book.replace(ticket, folder=source, retried_after=known[-1] if known else 0)
        self.enter(fresh, State.QUEUED, source=source, message="queued again by a person", problems=[])

    def cancel_deleted(self, job_id: str) -> bool:
        """A person deleted the ticket: that cancels the job, and `retry` brings it back. False when nothing is left."""
        run = self._root.run(job_id)
        ticket = ticket_copy(run)
        if ticket is None:
            return False
        open_log(run).state(State.CANCELLED, reason=Reason.USER.value, message="its ticket was deleted")
        put(self._root, "cancelled", ticket)
        return True


def _explain(run: RunFolder, verdict: Verdict, end: AttemptEnd) -> None:
    """ERROR.txt beside the spec of a job that did not end well; an older one goes when it did."""
    if verdict.state in (State.SUCCEEDED, State.INTERRUPTED) or not end.problems:
        run.error_text.unlink(missing_ok=True)
        return
    problems = "\n\n".join(problem_text(problem) for problem in end.problems)
    closing = f"The spec is kept in runs/{run.id}/spec.orig. After mending what is wrong: dropforge retry {run.id}"
    write_text(run.error_text, f"Job {run.id}: {verdict.state.value}.\n\n{problems}\n\n{closing}\n")
