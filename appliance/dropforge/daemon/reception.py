"""The inbox end of the daemon: look, settle, take a bounded number per round, leave faulty ones for later."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice

from dropforge.daemon.faults import Faults
from dropforge.daemon.hints import Hints
from dropforge.daemon.intake import Intake
from dropforge.daemon.names import printable
from dropforge.daemon.status_page import InboxEntry
from dropforge.daemon.watcher import Ready, SettleTracker, look
from dropforge.errors import EnvironmentFault
from dropforge.paths import DataRoot

log = logging.getLogger("dropforge.daemon")

FILES_PER_ROUND = 200
FLOOD = 500
"""More files than these are not taken in the order of their names."""
CHECKED_AT_ONCE = 1000
"""Specs given to one child at most: starting it takes as long as checking some hundreds."""
CHECKED_BYTES = 8 << 20
"""The same in bytes, which the daemon holds in memory meanwhile."""
CHECKED_AT_LEAST = 50
CHECKED_FIRST = 50
"""The first child gets so many: a job can start soon, and a slow machine is not held up."""
GROW_BELOW_SECONDS, SHRINK_ABOVE_SECONDS = 4.0, 8.0
"""How long one child may keep the daemon, whose heartbeat is stale after 15 s. Fewer, larger children are cheaper."""
SECONDS_PER_ROUND = 2.0
"""One round takes no more files after this time, so that a flood does not hold up running jobs."""
SECONDS_TO_THE_FIRST = 0.5
"""The same while a job could start and none is there, and more came than a person drops."""
LOOK_SHARE = 20
"""During a flood the folder is looked at again after so many times as long as that takes."""


class Reception:
    """Feeds settled files to the intake."""

    def __init__(
        self,
        root: DataRoot,
        intake: Intake,
        faults: Faults,
        hints: Hints,
        *,
        settle_seconds: float,
        poll_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        only_file: str = "",
    ) -> None:
        self._root = root
        self._intake = intake
        self._faults = faults
        self._hints = hints
        self._tracker = SettleTracker(root, settle_seconds=settle_seconds)
        self._clock = clock
        self._only_file = only_file
        self._batch = CHECKED_FIRST
        self._poll_seconds = poll_seconds
        self._look_again = float("-inf")
        self._fresh: deque[Ready] = deque()
        """Finished at the last look, and not considered yet."""
        self._refused: deque[Ready] = deque()
        """Considered, and to be moved to rejected/."""
        self._checked: frozenset[Ready] = frozenset()
        """Their verdicts are there."""

    def receive(self, *, now: float, idle: bool = False) -> bool:
        """Take some of what lies in the inbox at time `now`. True when there is more to take right away.

        Looking at the folder costs as much as taking dozens of files, so during a flood it is done once in a while.
        What has changed since the look is not taken: intake compares.

        Args:
            idle: a job could start and none is there: of a flood take no more than the first ones.

        Raises EnvironmentFault (inbox-read-only) when nothing could be claimed: then nothing is even tried.
        """
        if now >= self._look_again or not (self._fresh or self._refused):
            self._look(now)
        seconds = SECONDS_TO_THE_FIRST if idle and len(self._fresh) > self._batch else SECONDS_PER_ROUND
        deadline = self._clock() + seconds
        # Good ones first: a rejection costs more disk writes than a check, and nobody waits for it.
        return self._consider(now=now, seconds=seconds, idle=idle) or self._reject(now=now, deadline=deadline)

    def _look(self, now: float) -> None:
        began = self._clock()
        self._fresh, self._refused = deque(), deque()
        seen = look(self._root)
        if not os.access(self._root.inbox, os.W_OK | os.X_OK):
            raise EnvironmentFault(
                "inbox/ cannot be written, so no job is accepted", code="inbox-read-only", where=str(self._root.inbox),
                why="a file becomes a job by being moved out of it", fix="mount the data root writable, as one volume",
            )  # fmt: skip
        complete = self._hints.take_complete(seen.entries)
        self._intake.forget_all_but(set(seen.entries))
        ready = [entry for entry in self._tracker.update(seen, now=now, complete=complete) if self._mine(entry.name)]
        self._fresh = deque(_mixed([entry for entry in ready if not self._intake.waits(entry, now=now)]))
        self._refused = deque(entry for entry in ready if self._intake.is_refused(entry))
        self._intake.get_ready(len(self._fresh) + self._tracker.settling)
        self._look_again = now + max(self._poll_seconds, LOOK_SHARE * (self._clock() - began))

    def _consider(self, *, now: float, seconds: float, idle: bool) -> bool:
        """Accept what is good, and remember what is not. True when some was left for the next round."""
        accepted = considered = 0
        deadline = until = self._clock() + seconds
        while self._fresh:
            if accepted >= FILES_PER_ROUND or (considered and self._clock() > deadline):
                return True
            if self._fresh[0] not in self._checked:
                if considered and ((idle and accepted) or self._clock() > until):
                    return True
                self._check_ahead(self._next_batch())
                # Verdicts are there now, however long a busy machine took for them: a round that gave them up again
                # for the sake of time would take one file and pay for the next child. There is no next one in this
                # round after `until`: jobs end, control/ is obeyed and the heart beats between the rounds.
                deadline = self._clock() + seconds
            entry = self._fresh.popleft()
            considered += 1
            # What cannot be taken now (no space, a fault of ours) stays in the inbox and is tried again later.
            self._faults.guard(entry.name, partial(self._take, entry, now=now), now=now)
            if self._intake.is_refused(entry):
                self._refused.append(entry)
            accepted += not self._intake.waits(entry, now=now)
        return False

    def _next_batch(self) -> list[Ready]:
        """The first of those that are left, at least one."""
        batch: list[Ready] = []
        size = 0
        for entry in islice(self._fresh, self._batch):
            size += entry.fingerprint.size
            if batch and size > CHECKED_BYTES:
                break
            batch.append(entry)
        return batch

    def _check_ahead(self, entries: list[Ready]) -> None:
        """One child for all of `entries`; how many the next one gets depends on how long this one took."""
        began = self._clock()
        checked = self._intake.check_ahead(entries)
        self._checked = frozenset(entries[: max(1, checked)])  # the first without one is asked for by itself
        self._intake.get_ready(len(self._fresh) - checked)
        took = self._clock() - began
        if took > SHRINK_ABOVE_SECONDS:
            self._batch = max(self._batch // 2, CHECKED_AT_LEAST)
        elif took < GROW_BELOW_SECONDS and len(entries) == self._batch:
            self._batch = min(self._batch * 2, CHECKED_AT_ONCE)

    def _reject(self, *, now: float, deadline: float) -> bool:
        for number in range(len(self._refused)):
            if number >= FILES_PER_ROUND or (number and self._clock() > deadline):
                return True
            entry = self._refused.popleft()
            self._faults.guard(entry.name, partial(self._intake.reject, entry), now=now)
        return False

    def _mine(self, name: str) -> bool:
        return name == (self._only_file or name) and not self._faults.stands(name)

    def _take(self, entry: Ready, *, now: float) -> None:
        job_id = self._intake.consider(entry, now=now)
        if job_id is not None:
            log.info("%s: accepted", job_id, extra={"action": "accepted"})

    def close(self) -> None:
        """Nothing more will be received."""
        self._intake.get_ready(0)

    @property
    def count(self) -> int:
        """How many files lie in the inbox and are not jobs yet."""
        return len(self._tracker.waiting)

    @property
    def settles_at(self) -> float:
        """Monotonic time at which the next file will have settled."""
        return self._tracker.settles_at

    def entries(self, most: int) -> list[InboxEntry]:
        """So many of the files in the inbox, for people."""
        unfinished = {item.name: item for item in self._intake.unfinished}
        return [
            InboxEntry(
                file=printable(name), stage="unfinished",
                message=f"waits for its missing part, then will be rejected: {unfinished[name].error.problems[0].what}",
            ) if name in unfinished else InboxEntry(file=printable(name), stage="settling")
            for name in sorted(self._tracker.waiting)[:most]
        ]  # fmt: skip


def _mixed(entries: list[Ready]) -> list[Ready]:
    """In order, as long as they are few; those of a flood as if shuffled, the same way at every look.

    Where some are bad, their neighbours are likely to be bad too, and a good one should not have to wait for all those.
    """
    if len(entries) <= FLOOD:
        return entries
    return sorted(entries, key=lambda entry: hashlib.sha256(os.fsencode(entry.name)).digest())
