"""The inbox end of the daemon: look, settle, take a bounded number per look, leave faulty ones for later."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial

from dropforge.daemon.faults import Faults
from dropforge.daemon.hints import Hints
from dropforge.daemon.intake import Intake
from dropforge.daemon.names import printable
from dropforge.daemon.status_page import InboxEntry
from dropforge.daemon.watcher import Ready, SettleTracker, look
from dropforge.errors import EnvironmentFault
from dropforge.paths import DataRoot

log = logging.getLogger("dropforge.daemon")

FILES_PER_LOOK = 200
CHECKED_AT_ONCE = 500
"""Specs given to one child at most: starting it takes as long as checking some hundreds."""
CHECKED_AT_LEAST = 50
CHECKED_FIRST = 50
"""The first child gets so many: a job can start soon, and a slow machine is not held up."""
GROW_BELOW_SECONDS, SHRINK_ABOVE_SECONDS = 7.0, 10.0
"""How long one child may keep the daemon, whose heartbeat is stale after 15 s. Fewer, larger children are cheaper."""
SECONDS_PER_LOOK = 2.0
"""One look takes no more files after this time, so that a flood does not hold up running jobs."""


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

    def receive(self, *, now: float) -> bool:
        """One look at the inbox at time `now`. True when there is more to take right away.

        Raises EnvironmentFault (inbox-read-only) when nothing could be claimed: then nothing is even tried.
        """
        seen = look(self._root)
        if not os.access(self._root.inbox, os.W_OK | os.X_OK):
            raise EnvironmentFault(
                "inbox/ cannot be written, so no job is accepted", code="inbox-read-only", where=str(self._root.inbox),
                why="a file becomes a job by being moved out of it", fix="mount the data root writable, as one volume",
            )  # fmt: skip
        complete = self._hints.take_complete(seen.entries)
        self._intake.forget_all_but(set(seen.entries))
        ready = [entry for entry in self._tracker.update(seen, now=now, complete=complete) if self._mine(entry.name)]
        deadline = self._clock() + SECONDS_PER_LOOK
        # Good ones first: a rejection costs more disk writes than a check, and nobody waits for it.
        return self._consider(ready, now=now, deadline=deadline) or self._reject(ready, now=now, deadline=deadline)

    def _consider(self, ready: list[Ready], *, now: float, deadline: float) -> bool:
        """Accept what is good, and remember what is not. True when some was left for the next look."""
        fresh = _mixed([entry for entry in ready if not self._intake.waits(entry, now=now)])
        accepted, checked = 0, 0
        for number, entry in enumerate(fresh):
            if accepted >= FILES_PER_LOOK or (number and self._clock() > deadline):
                return True
            if number == checked:
                checked += self._batch
                self._check_ahead(fresh[number:checked])
                # Verdicts are there now, however long a busy machine took for them: a look that gave them up again
                # for the sake of time would take one file and pay for the next child.
                deadline = max(deadline, self._clock() + SECONDS_PER_LOOK)
            # What cannot be taken now (no space, a fault of ours) stays in the inbox and is tried again later.
            self._faults.guard(entry.name, partial(self._take, entry, now=now), now=now)
            accepted += not self._intake.waits(entry, now=now)
        return False

    def _check_ahead(self, entries: list[Ready]) -> None:
        """One child for all of `entries`; how many the next one gets depends on how long this one took."""
        began = self._clock()
        self._intake.check_ahead(entries)
        took = self._clock() - began
        if took > SHRINK_ABOVE_SECONDS:
            self._batch = max(self._batch // 2, CHECKED_AT_LEAST)
        elif took < GROW_BELOW_SECONDS and len(entries) == self._batch:
            self._batch = min(self._batch * 2, CHECKED_AT_ONCE)

    def _reject(self, ready: list[Ready], *, now: float, deadline: float) -> bool:
        refused = [entry for entry in ready if self._intake.is_refused(entry)]
        for number, entry in enumerate(refused):
            if number >= FILES_PER_LOOK or (number and self._clock() > deadline):
                return True
            self._faults.guard(entry.name, partial(self._intake.reject, entry), now=now)
        return False

    def _mine(self, name: str) -> bool:
        return name == (self._only_file or name) and not self._faults.stands(name)

    def _take(self, entry: Ready, *, now: float) -> None:
        job_id = self._intake.consider(entry, now=now)
        if job_id is not None:
            log.info("%s: accepted", job_id, extra={"action": "accepted"})

    @property
    def entries(self) -> list[InboxEntry]:
        """What lies in the inbox and is not a job yet, for people."""
        unfinished = {item.name: item for item in self._intake.unfinished}
        return [
            InboxEntry(
                file=printable(name), stage="unfinished",
                message=f"waits for its missing part, then will be rejected: {unfinished[name].error.problems[0].what}",
            ) if name in unfinished else InboxEntry(file=printable(name), stage="settling")
            for name in self._tracker.waiting
        ]  # fmt: skip


def _mixed(entries: list[Ready]) -> list[Ready]:
    """In order, as long as one child can check them all; those of a flood as if shuffled, the same way at every look.

    Where some are bad, their neighbours are likely to be bad too, and a good one should not have to wait for all those.
    """
    if len(entries) <= CHECKED_AT_ONCE:
        return entries
    return sorted(entries, key=lambda entry: hashlib.sha256(os.fsencode(entry.name)).digest())
