"""What the daemon watches about jobs that run: their time limit, their pace, and the machine's memory."""

from __future__ import annotations

import logging

from dropforge.daemon import attempts
from dropforge.daemon.memory_watch import MIB, MemoryWatch, session_bytes
from dropforge.daemon.stalls import StallWatch
from dropforge.daemon.worker import Worker
from dropforge.errors import Reason
from dropforge.paths import DataRoot

log = logging.getLogger("dropforge.daemon")


class Guards:
    """Asks a job to stop when it goes over a limit; the worker ends it by force when it does not."""

    def __init__(self, root: DataRoot, worker: Worker, *, stalls: StallWatch, memory: MemoryWatch) -> None:
        self._root = root
        self._worker = worker
        self._stalls = stalls
        self.memory = memory

    def enforce_time_limits(self, now: float) -> None:
        for job in self._worker.running:
            limit = job.ticket.time_limit
            if limit is None or job.kill_at is not None:
                continue
            earlier = attempts.ends(self._root.run(job.ticket.id), after=job.ticket.retried_after)
            if sum(end.seconds for end in earlier) + now - job.started >= limit:
                self._worker.ask_to_stop(job.ticket.id, Reason.TIMEOUT, now=now)

    def look_for_stalls(self, now: float) -> None:
        self._stalls.forget_all_but({(job.ticket.id, job.attempt) for job in self._worker.running})
        for job in self._worker.running:
            waited = self._stalls.look(self._root.run(job.ticket.id), job.attempt, now=now)
            if waited is not None and job.kill_at is None:
                log.warning("%s: no step for %.0f s", job.ticket.id, waited, extra={"action": "stalled"})
                self._worker.ask_to_stop(job.ticket.id, Reason.STALLED, now=now)

    def look_at_memory(self, now: float) -> None:
        """Below the floor: the waiting runner goes first, then the largest job is asked to save, then it is killed."""
        self.memory.look(now=now)
        if not self.memory.low:
            return
        self._worker.stop_warm()
        sizes = {job.ticket.id: session_bytes(job.child.pid) for job in self._worker.running}
        if not sizes:
            return
        asked = [job.ticket.id for job in self._worker.running if job.asked is Reason.OOM_HOST]
        job_id = asked[0] if asked else max(sizes, key=lambda known: sizes[known])
        if not asked:
            log.warning("%s uses %d MiB and is stopped: %s", job_id, sizes[job_id] // MIB, self.memory.text,
                        extra={"action": "memory"})  # fmt: skip
        self._worker.ask_to_stop(job_id, Reason.OOM_HOST, now=now)
        if self.memory.must_kill(now=now):
            self._worker.kill_now(job_id)
