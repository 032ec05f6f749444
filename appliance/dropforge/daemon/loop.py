"""The daemon: one thread, one loop, all state on disk.

    look at runners that ended -> do what control/ asks -> take what settled in the inbox -> enforce time limits
    -> start what may start -> say how things stand -> wait

Everything is decided on the monotonic clock given to `tick`, so tests set the time. A fault in one file or job is
logged and does not stop the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType

from dropforge.daemon import attempts
from dropforge.daemon.attempts import AttemptEnd
from dropforge.daemon.backfill import slots_busy_for
from dropforge.daemon.control import Switch, is_on, set_switch
from dropforge.daemon.crash_points import CrashHook, ignore
from dropforge.daemon.daemon_log import DaemonLog
from dropforge.daemon.disk import DiskWatch, with_reserve
from dropforge.daemon.faults import Faults
from dropforge.daemon.gpu_memory import GpuWatch, Read, read_driver
from dropforge.daemon.guards import Guards
from dropforge.daemon.hints import Hints
from dropforge.daemon.intake import CheckSpec, Intake
from dropforge.daemon.layout import bring_up_to_date, open_root, unusable
from dropforge.daemon.memory_watch import MemoryWatch, available_bytes
from dropforge.daemon.metrics_page import MetricsServer, Numbers, as_text
from dropforge.daemon.notify import Notifier, message_about
from dropforge.daemon.orders import Orders
from dropforge.daemon.query import read_status
from dropforge.daemon.queue import LIVE_FOLDERS, Ticket, TicketBook
from dropforge.daemon.reception import Reception
from dropforge.daemon.recover import recover
from dropforge.daemon.rests import Rests
from dropforge.daemon.scheduler import Ages, Schedule, Waiting, schedule
from dropforge.daemon.signals import on_stop_signals, status_after
from dropforge.daemon.singleton import HEARTBEAT_SECONDS, Singleton, write_heartbeat
from dropforge.daemon.stalls import StallWatch
from dropforge.daemon.status_page import QUEUE_LISTED, write_pages
from dropforge.daemon.transitions import Transitions, open_log
from dropforge.daemon.worker import RUNNER_COMMAND, Ended, Worker
from dropforge.errors import Reason
from dropforge.paths import DataRoot
from dropforge.spec_check import check_in_child
from dropforge.states import State

log = logging.getLogger("dropforge.daemon")

FAULT_SECONDS = 30.0
"""A file that met an unexpected fault (full disk, a bug of ours) is tried again after this time."""
BUSY_WAIT_SECONDS = 0.1
PAGE_SECONDS = 2.0
NOTED_AT_HEAD = 20
"""So many jobs at the head of the queue get `waiting_for` in their own status.json; queue.json has it for more."""


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """How the daemon behaves; settings.py reads the values users may set."""

    poll_seconds: float = 1.0
    settle_seconds: float = 5.0
    grace_seconds: float = 120.0
    warm: bool = True
    """Keep a runner ready that has imported the training libraries."""
    gpus: tuple[str, ...] = ()
    """UUIDs of the GPUs that jobs may use; empty: the CPU."""
    gpu_memory: Read = read_driver
    """Reads how much memory of each GPU is in use."""
    stall_seconds: float = 1800.0
    """So long without a step is never a stall; 0: no watch."""
    memory_floor: int = 0
    """Bytes of memory that jobs must leave; 0: no watch."""
    metrics_port: int = 0
    """Port on loopback for Prometheus; 0: off."""
    notify_url: str = ""
    """Where ended jobs are told; empty: secrets/NOTIFY_URL, else nowhere."""
    notify_format: str = "webhook"
    only_file: str = ""
    """Take and run only the job dropped under this name; everything else stays where it is (`dropforge run`)."""


class Daemon:
    """Serves one data root while entered. `run` is the whole life; `tick` is one round of it.

    Args:
        check: turns spec bytes into a CheckedSpec, in a limited child.
        runner_command: how a runner is started.
        crash: called at every labelled crash point.
        clock: seconds, monotonic.
    """

    def __init__(
        self, root: DataRoot, *, options: DaemonOptions, check: CheckSpec = check_in_child,
        runner_command: Sequence[str] = RUNNER_COMMAND, crash: CrashHook = ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.root = open_root(root)
        self.exit_status = 0
        """For the process: 0, or what says which signal ended `run`."""
        self.options = options
        self._clock = clock
        self._crash = crash
        self._lock = Singleton(root)
        self._log_file = DaemonLog(root)
        self._hints = Hints(root)
        self._faults = Faults(seconds=FAULT_SECONDS)
        self._book = TicketBook(root)
        self._transitions = Transitions(root, self._book, crash=crash)
        self._worker = Worker(root, runner_command=runner_command, grace_seconds=options.grace_seconds,
                              warm=options.warm)  # fmt: skip
        self._orders = Orders(root, self._book, self._transitions, self._worker, crash=crash)
        intake = Intake(root, self._book, check=check, crash=crash)
        self._reception = Reception(root, intake, self._faults, self._hints, settle_seconds=options.settle_seconds,
                                    poll_seconds=options.poll_seconds, clock=clock,
                                    only_file=options.only_file)  # fmt: skip
        self._guards = Guards(root, self._worker, stalls=StallWatch(floor=options.stall_seconds),
                              memory=MemoryWatch(floor=options.memory_floor))  # fmt: skip
        self._notifier = Notifier(root, url=options.notify_url, form=options.notify_format)
        self._metrics = MetricsServer(port=options.metrics_port)
        self._counts: Counter[str] = Counter()
        self._ages = Ages()
        self._busy_for: Mapping[str, float | None] = {}
        self._schedule = Schedule(starts=(), waiting=())
        self._ended: list[Ended] = []
        self._noted: dict[str, str] = {}
        self._gpu_watch = GpuWatch(options.gpu_memory)
        self._disk = DiskWatch(root)
        self._rests = Rests(root, self._disk)
        self._stop = threading.Event()
        self._kill = self._flood = False
        self._next_look = self._next_page = self._next_beat = float("-inf")
        self._settles_at = float("inf")

    def __enter__(self) -> Daemon:
        with ExitStack() as undo:
            for part in (self._lock, self._log_file, self._hints):
                undo.enter_context(part)
            try:
                with_reserve(self.root, self._recover)
            except OSError as error:
                raise unusable(self.root, error) from error
            undo.pop_all()
        self._faults.guard("metrics", self._metrics.start, now=self._clock())
        log.info("serving %s", self.root.path, extra={"action": "start"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = self._clock()
        self._reception.close()
        self._worker.kill_all()
        self._collect(now)
        self._faults.guard("STATUS.md", lambda: self._write_pages("stopped"), now=now)
        self._faults.guard("state/daemon.json", lambda: self._beat("stopped"), now=now)
        self._metrics.stop()
        self._notifier.close()
        self._hints.__exit__(kind, error, trace)
        self._lock.__exit__(kind, error, trace)
        log.info("stopped", extra={"action": "stop"})
        self._log_file.__exit__(kind, error, trace)

    def _recover(self) -> None:
        for layout in bring_up_to_date(self.root):
            log.info("the data root is migrated from layout %d", layout, extra={"action": "migrated"})
        self._beat("recovering")
        recover(self.root, self._book, self._transitions, grace_seconds=self.options.grace_seconds)

    def run(self, *, until: Callable[[], bool] = lambda: False) -> None:
        """Serve until SIGTERM, SIGINT, `stop`, a finished drain, or `until` says so after a round.

        Running jobs save and return to the queue.
        """
        with on_stop_signals(self._stop_for, self._stop_at_once):
            while not (self._stop.is_set() or self._drained() or until()):
                self.tick()
                if self._hints.wait(self._patience()):
                    self._next_look = float("-inf")
            self._end_jobs()

    def stop(self) -> None:
        """Thread-safe; also from signal handlers, also before `run`."""
        self._stop.set()
        self._hints.wake()

    def tick(self, now: float | None = None) -> None:
        """One round at monotonic time `now`."""
        now = self._clock() if now is None else now
        self._collect(now)
        looks = now >= self._next_look
        if looks:
            self._next_look = now + self.options.poll_seconds
            self._faults.expire(now)
            self._faults.guard("the disk", self._disk.look, now=now)
            self._faults.guard("the queue folders", self._orders.refresh, now=now)
            self._faults.guard("control/", lambda: self._orders.obey(now=now), now=now)
            self._faults.guard("inbox/", lambda: self._receive(now), now=now)
            self._busy_for = slots_busy_for(self.root, self._worker.running)
            self._faults.guard("stalls", lambda: self._guards.look_for_stalls(now), now=now)
        self._faults.guard("memory", lambda: self._guards.look_at_memory(now), now=now)
        self._faults.guard("time limits", lambda: self._guards.enforce_time_limits(now), now=now)
        # Sorting 10,000 queued jobs ten times a second would take from the running one.
        if looks or self._has_free_slot():
            self._start_jobs(now)
        if not self._guards.memory.low:
            self._faults.guard("the warm runner", self._worker.keep_warm, now=now)
        if now >= self._next_page:
            self._next_page = now + PAGE_SECONDS
            self._faults.guard("STATUS.md", lambda: self._write_pages(self._mode()), now=now)
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_SECONDS
            self._faults.guard("state/daemon.json", lambda: self._beat(self._mode()), now=now)

    def _receive(self, now: float) -> None:
        idle = not self._book.tickets("queue") and self._has_free_slot()
        self._flood, self._settles_at = False, float("inf")
        self._flood = self._reception.receive(now=now, idle=idle)
        self._settles_at = self._reception.settles_at
        # A flood goes on in the next round, and a file is taken as soon as it has settled.
        self._next_look = now if self._flood else min(self._next_look, self._settles_at)

    def _has_free_slot(self) -> bool:
        return len(self._worker.busy_slots) < max(1, len(self.options.gpus))

    def _patience(self) -> float:
        """Seconds until the next round."""
        if self._flood:
            return 0.0
        wait = BUSY_WAIT_SECONDS if self._worker.running else self.options.poll_seconds
        return max(0.0, min(wait, self._settles_at - self._clock()))

    def _collect(self, now: float) -> None:
        """Give every ended runner's job its next state; one whose state cannot be written now is tried again."""
        self._ended += [replace(ended, room=self._disk.measure()) for ended in self._worker.poll(now=now)]
        self._ended = [
            ended
            for ended in self._ended
            if not self._faults.guard(f"ending {ended.ticket.id}", partial(self._finish, ended, now), now=now)
        ]

    def _finish(self, ended: Ended, now: float) -> None:
        self._gpu_watch.forget()
        run = self.root.run(ended.ticket.id)
        if attempts.read_end(run, ended.attempt) is None:
            with_reserve(self.root, partial(attempts.write_end, run, ended.attempt, ended.end))
        self._crash("end.attempt-closed")
        verdict = self._transitions.finish(ended.ticket, ended.attempt, ended.end)
        self._rests.begin(ended, verdict, now=now)
        self._counts[verdict.state] += 1
        if verdict.state.ended or verdict.state is State.HELD:
            self._notifier.tell(message_about(self.root, ended.ticket, verdict))
        log.info("%s: %s %s", ended.ticket.id, verdict.state, verdict.message, extra={"action": "ended"})

    def _start_jobs(self, now: float) -> None:
        queued = self._book.tickets("queue")
        if self.options.only_file:
            queued = [ticket for ticket in queued if ticket.file == self.options.only_file]
        self._schedule = schedule(
            queued,
            gpus=self.options.gpus,
            busy=self._worker.busy_slots,
            held=self._held_by_others(queued, now),
            blocked=self._blocked(),
            resting=self._rests.waiting(now),
            ages=self._ages.points(queued, now=now),
            busy_for=self._busy_for,
        )
        for ticket, slots in self._schedule.starts:
            what = f"starting {ticket.id}"
            if not self._stop.is_set() and not self._faults.stands(what):
                self._faults.guard(what, partial(self._start, ticket, slots, now), now=now)
        self._faults.guard("waiting_for", self._note_waiting, now=now)

    def _held_by_others(self, queued: Sequence[Ticket], now: float) -> dict[str, str]:
        """GPUs that somebody else uses, with how much memory; asked only when a job could start."""
        free = set(self.options.gpus) - self._worker.busy_slots if queued else set()
        return {slot: memory.text for slot, memory in self._gpu_watch.held(free, now=now).items()}

    def _start(self, ticket: Ticket, slots: tuple[str, ...], now: float) -> None:
        attempt = attempts.open_next(self.root.run(ticket.id))
        self._crash("start.attempt-made")
        self._transitions.enter(ticket, State.PREPARING, source="queue", message="starting", attempt=attempt,
                                slots=list(slots), waiting_for=None)  # fmt: skip
        self._crash("start.ticket-moved")
        try:
            gpus = slots if self.options.gpus else ()
            self._worker.start(ticket, attempt=attempt, slots=slots, gpus=gpus, now=now)
        except OSError as error:
            end = AttemptEnd(state=State.INTERRUPTED, reason=Reason.INTERNAL, died=True,
                             message=f"its process could not be started: {error}")  # fmt: skip
            self._ended.append(Ended(ticket=ticket, attempt=attempt, end=end, room=self._disk.free))
            raise
        self._crash("start.spawned")
        self._noted.pop(ticket.id, None)
        log.info("%s: attempt %d started", ticket.id, attempt, extra={"action": "started"})

    def _note_waiting(self) -> None:
        """Write into status.json why a job waits, when the kind of reason changes."""
        for ticket, waiting in self._schedule.waiting[:NOTED_AT_HEAD]:
            if self._noted.get(ticket.id) != waiting.kind:
                self._noted[ticket.id] = waiting.kind
                run_log = open_log(self.root.run(ticket.id))
                run_log.progress(waiting_for=f"{waiting.kind}: {waiting.text}")

    def _blocked(self) -> Waiting | None:
        """Why nothing at all may start now."""
        if is_on(self.root, Switch.DRAIN):
            return Waiting(kind="pause", text="the daemon drains (control/drain): nothing new is started")
        if is_on(self.root, Switch.PAUSE):
            return Waiting(kind="pause", text="paused (control/pause)")
        if self._disk.low:
            return Waiting(kind="disk", text=self._disk.text)
        return Waiting(kind="memory", text=self._guards.memory.text) if self._guards.memory.low else None

    def _mode(self) -> str:
        if is_on(self.root, Switch.DRAIN):
            return "draining"
        return "paused" if is_on(self.root, Switch.PAUSE) else "running"

    def _drained(self) -> bool:
        """True once nothing runs after a drain was asked for; the request is used up by it."""
        if not is_on(self.root, Switch.DRAIN) or self._worker.running or self._ended:
            return False
        set_switch(self.root, Switch.DRAIN, on=False)
        return True

    def _end_jobs(self) -> None:
        """Ask every runner to save and end, and wait; a second signal cuts the wait short."""
        now = self._clock()
        self._worker.stop_warm()
        for job in self._worker.running:
            self._worker.ask_to_stop(job.ticket.id, Reason.SHUTDOWN, now=now)
        self._faults.guard("STATUS.md", lambda: self._write_pages("stopping"), now=now)
        while self._worker.running:
            if self._kill:
                self._worker.kill_all()
            self._collect(self._clock())
            time.sleep(BUSY_WAIT_SECONDS / 2)

    def _stop_for(self, number: int) -> None:
        self.exit_status = status_after(number)
        self.stop()

    def _stop_at_once(self) -> None:
        self._kill = True

    def _write_pages(self, mode: str) -> None:
        if self._metrics.on:
            self._metrics.page = as_text(self._numbers())
        inbox = self._reception.entries(QUEUE_LISTED)
        write_pages(self.root, daemon=mode, problems=self._faults.messages, inbox=inbox,
                    inbox_more=self._reception.count - len(inbox), waiting=self._schedule.waiting)  # fmt: skip

    def _numbers(self) -> Numbers:
        running = [read_status(self.root.run(job.ticket.id)) for job in self._worker.running]
        return Numbers(
            jobs={folder: len(self._book.tickets(folder)) for folder in LIVE_FOLDERS}, ended=self._counts,
            inbox=self._reception.count, problems=len(self._faults.messages), disk_free=self._disk.free,
            memory_available=available_bytes(), running=running,
        )  # fmt: skip

    def _beat(self, mode: str) -> None:
        write_heartbeat(
            self.root, state=mode, problems=self._faults.messages,
            running=[job.ticket.id for job in self._worker.running], queued=len(self._book.tickets("queue")),
        )  # fmt: skip
