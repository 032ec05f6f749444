"""Starts runners, sees how they end, and stops them: each one a child in a session of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dropforge.daemon import attempts, out_of_memory, process
from dropforge.daemon.attempts import AttemptEnd
from dropforge.daemon.disk import is_full
from dropforge.daemon.queue import Ticket
from dropforge.daemon.verdict import OUT_OF_MEMORY, RETRIED_REASONS, explain_death
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from dropforge.states import State

log = logging.getLogger("dropforge.daemon")

RUNNER_COMMAND = (sys.executable, "-P", "-m", "dropforge.daemon.runner")


@dataclass
class Running:
    """One job that runs now."""

    ticket: Ticket
    attempt: int
    slots: tuple[str, ...]
    child: subprocess.Popen[bytes]
    started: float
    """Monotonic seconds of the daemon."""
    oom_kills_before: int | None
    kill_at: float | None = None
    """When patience ends, after a request to stop."""
    asked: Reason | None = None
    """Why it was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A runner that is gone, with everything it had started. Its end may not be on the disk yet."""

    ticket: Ticket
    attempt: int
    end: AttemptEnd
    room: int = 0
    """Free bytes of disk at that moment."""


class Worker:
    """Owner of all runners of this daemon.

    Args:
        runner_command: how a runner is started; tests give one that runs a fake job.
        grace_seconds: between the request to stop and the end by force.
        warm: keep one runner that has imported everything and waits for the next job.
        oom_kills: reads the kernel's counter of deaths for lack of memory.
    """

    def __init__(
        self, root: DataRoot, *, runner_command: Sequence[str] = RUNNER_COMMAND, grace_seconds: float, warm: bool,
        oom_kills: Callable[[], int | None] = out_of_memory.kill_count,
    ) -> None:  # fmt: skip
        self._root = root
        self._command = list(runner_command)
        self._grace_seconds = grace_seconds
        self._wants_warm = warm
        self._oom_kills = oom_kills
        self._running: dict[str, Running] = {}
        self._warm: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> list[Running]:
        return list(self._running.values())

    @property
    def busy_slots(self) -> set[str]:
        return {slot for job in self._running.values() for slot in job.slots}

    def start(self, ticket: Ticket, *, attempt: int, slots: tuple[str, ...], gpus: tuple[str, ...], now: float) -> None:
        """Start a runner for a ticket that lies in running/ already."""
        output = attempts.log_of(self._root.run(ticket.id), attempt)
        output.touch()  # from now on the attempt counts as started
        oom_kills = self._oom_kills()
        child = self._hand_to_warm(ticket, attempt, gpus) if self._warm_is_alive() else None
        if child is None:
            with output.open("ab") as stream:
                child = self._spawn(
                    "--id", ticket.id, "--attempt", str(attempt), "--gpus", ",".join(gpus),
                    "--grace", str(self._grace_seconds), stdout=stream,
                )  # fmt: skip
        self._running[ticket.id] = Running(
            ticket=ticket, attempt=attempt, slots=slots, child=child, started=now, oom_kills_before=oom_kills
        )

    def poll(self, *, now: float) -> list[Ended]:
        """Runners that have ended since the last call. Those past their grace period are killed."""
        ended = []
        for job in self.running:
            if job.kill_at is not None and now >= job.kill_at:
                job.kill_at = None
                process.kill_family(job.child.pid)
            if _has_ended(job.child.pid):
                ended.append(self._finish(job, now=now))
        return ended

    def ask_to_stop(self, job_id: str, reason: Reason, *, now: float) -> None:
        """SIGTERM now, SIGKILL to the whole session after the grace period. Asking again changes nothing."""
        job = self._running[job_id]
        if job.kill_at is None:
            job.kill_at = now + self._grace_seconds
            job.asked = reason
            try:
                attempts.write_stop(self._root.run(job_id), job.attempt, reason)
            except OSError as error:  # a full disk; the signal alone says that it has to stop
                log.error("%s: the reason to stop could not be written: %s", job_id, error, extra={"action": "fault"})
            process.kill(job.child.pid, signal.SIGTERM)

    def ask_for_checkpoint(self, job_id: str) -> None:
        process.kill(self._running[job_id].child.pid, signal.SIGUSR1)

    def kill_now(self, job_id: str) -> None:
        """End one job without waiting for its grace period; `poll` reports it."""
        process.kill_family(self._running[job_id].child.pid)

    def kill_all(self) -> None:
        """End everything at once, without grace."""
        for job in self.running:
            process.kill_family(job.child.pid)
        self.stop_warm()

    def keep_warm(self) -> None:
        """Start the waiting runner if there is none and no job runs (its imports would slow a running job down)."""
        if self._wants_warm and not self._running and not self._warm_is_alive():
            with (self._root.state / "warm-runner.log").open("wb") as stream:
                self._warm = self._spawn("--warm", stdout=stream, stdin=subprocess.PIPE)

    def stop_warm(self) -> None:
        if self._warm is not None:
            warm, self._warm = self._warm, None
            process.kill_family(warm.pid)
            warm.wait()
            if warm.stdin is not None:
                warm.stdin.close()

    def _warm_is_alive(self) -> bool:
        if self._warm is not None and self._warm.poll() is not None:
            # It dies only when its imports fail; trying again every second would help nobody. The job will say why.
            self._wants_warm = False
            self.stop_warm()
        return self._warm is not None

    def _hand_to_warm(self, ticket: Ticket, attempt: int, gpus: tuple[str, ...]) -> subprocess.Popen[bytes] | None:
        """Give the job to the waiting runner; None when it died meanwhile. It is used once."""
        warm, self._warm = self._warm, None
        assert warm is not None and warm.stdin is not None, "checked by the caller"
        output = attempts.log_of(self._root.run(ticket.id), attempt)
        order = {"id": ticket.id, "attempt": attempt, "gpus": gpus, "grace": self._grace_seconds, "log": str(output)}
        try:
            warm.stdin.write(json.dumps(order).encode() + b"\n")
            warm.stdin.close()
        except BrokenPipeError:
            warm.wait()
            return None
        return warm

    def _spawn(self, *arguments: str, stdout: object, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        command = [*self._command, "--data", str(self._root.path), "--parent", str(os.getpid()), *arguments]
        return subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True, cwd=self._root.path
        )  # type: ignore[call-overload, no-any-return]

    def _finish(self, job: Running, *, now: float) -> Ended:
        # Not reaped yet: the kernel still keeps its number, so nobody else can be hit.
        process.kill_family(job.child.pid)
        exit_status = job.child.wait()
        del self._running[job.ticket.id]
        run = self._root.run(job.ticket.id)
        end = attempts.read_end(run, job.attempt)
        after = self._oom_kills()
        starved = after is not None and job.oom_kills_before is not None and after > job.oom_kills_before
        if end is not None and end.reason is Reason.CRASH and starved:  # of a process that it had started
            end = replace(end, reason=Reason.OOM_HOST, message=f"{OUT_OF_MEMORY}; the job said: {end.message}")
            attempts.write_end(run, job.attempt, end)
        if end is None:
            reason, message = explain_death(exit_status, out_of_memory=starved)
            if attempts.read_stop(run, job.attempt) is Reason.STALLED:  # it did not even react to the request to stop
                reason, message = Reason.STALLED, RETRIED_REASONS[Reason.STALLED]
            end = AttemptEnd(
                state=State.INTERRUPTED, reason=reason, message=message, died=True,
                seconds=round(now - job.started, 3), progress=attempts.progress(run),
            )  # fmt: skip
            if exit_status == 1 and is_full(self._root):  # it could not even say so
                end = replace(end, state=State.FAILED, reason=Reason.DISK, message="the disk is full", no_space=True)
        return Ended(ticket=job.ticket, attempt=job.attempt, end=end)


def _has_ended(pid: int) -> bool:
    """True once the child is dead, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
