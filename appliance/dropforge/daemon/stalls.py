"""Training that makes no step any more: found by the job's own pace, not by whether its process still talks.

Time counts only while the job says `training`. A batch of an evaluation is a sign of life like a step, so an evaluation
may last as long as it needs; it does not slow the pace down. Whatever else happens between two steps (a checkpoint) is
part of the pace once it was seen, and covered by the floor before.
"""

from __future__ import annotations

from dataclasses import dataclass

from dropforge.daemon.query import read_status
from dropforge.paths import RunFolder
from dropforge.states import State

TIMES_THE_SLOWEST = 20.0
"""A stall is this many times the longest gap between two steps of this attempt."""
FIRST_STEP_FACTOR = 2.0
"""The first step compiles and allocates, and there is nothing to compare it with: so many times the floor."""
FROZEN_SECONDS = 60.0
"""Nobody looked for so long: the container was paused or the machine slept, and the job with it: not counted."""


@dataclass
class _Pace:
    step: int
    since: float
    seen: float
    batches: int = 0
    slowest: float | None = None


class StallWatch:
    """Remembers the pace of each running attempt.

    Args:
        floor: seconds without a step that are never a stall; 0 switches the watch off.
    """

    def __init__(self, *, floor: float) -> None:
        self._floor = floor
        self._paces: dict[tuple[str, int], _Pace] = {}

    def forget_all_but(self, running: set[tuple[str, int]]) -> None:
        self._paces = {key: pace for key, pace in self._paces.items() if key in running}

    def look(self, run: RunFolder, attempt: int, *, now: float) -> float | None:
        """Seconds since the last step when that is too long, else None."""
        status = read_status(run)
        if not self._floor or status.get("state") != State.TRAINING:
            self._paces.pop((run.id, attempt), None)
            return None
        step, batches = status.get("step"), status.get("eval_batches")
        return self.observe(run.id, attempt, step=step if type(step) is int else 0,
                            batches=batches if type(batches) is int else 0, now=now)  # fmt: skip

    def observe(self, job_id: str, attempt: int, *, step: int, now: float, batches: int = 0) -> float | None:
        """`look`, with the step that was read. To be called at least every FROZEN_SECONDS."""
        pace = self._paces.setdefault((job_id, attempt), _Pace(step=step, since=now, seen=now, batches=batches))
        if now - pace.seen > FROZEN_SECONDS:
            pace.since += now - pace.seen
        pace.seen = now
        if batches != pace.batches:
            pace.batches, pace.since = batches, now
        waited = now - pace.since
        if step != pace.step:
            steps = max(step - pace.step, 1)  # several steps between two looks: their mean
            pace.slowest = max(pace.slowest or 0.0, waited / steps)
            pace.step, pace.since = step, now
            return None
        return waited if waited > self._budget(pace) else None

    def _budget(self, pace: _Pace) -> float:
        if pace.slowest is None:
            return self._floor * FIRST_STEP_FACTOR
        return max(self._floor, TIMES_THE_SLOWEST * pace.slowest)
