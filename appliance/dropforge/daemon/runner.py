"""The child process that does one job: `python -m dropforge.daemon.runner --data ROOT --id ID --attempt N`.

Protocol with the daemon, files and signals only:
    status.json, events.jsonl, metrics.jsonl   written here while the job runs
    lease.json                                 which process this is, and its heartbeat
    attempts/NNN/exit.json                     written last: how it ended
    SIGTERM                                    save a checkpoint and end; the reason is in attempts/NNN/stop.json
    SIGUSR1                                    save a checkpoint and go on
    death of the daemon                        counts as SIGTERM
With --warm it first imports the heavy libraries and then reads its job, one line of JSON, from standard input.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from dropforge.daemon import attempts, process
from dropforge.daemon.attempts import AttemptEnd, log_of
from dropforge.daemon.disk import make_room, with_reserve
from dropforge.daemon.job_output import JobOutput
from dropforge.daemon.lease import Lease
from dropforge.daemon.redact import known_secrets, redact, redact_all
from dropforge.daemon.unexpected import end_of_unexpected, no_space_in
from dropforge.errors import DropforgeError, JobStopped, Reason
from dropforge.events import RunLog
from dropforge.paths import DataRoot, RunFolder
from dropforge.states import State
from dropforge.stop import StopSignal

WARM_MODULES = ("torch", "transformers", "peft", "datasets", "trl", "dropforge.job")
_EXIT_STATUS = {State.SUCCEEDED: 0, State.PARTIAL: 0, State.FAILED: 1, State.INTERRUPTED: 75}


class JobFunction(Protocol):
    """What a runner runs: dropforge.job.run_job, or a fake one in tests."""

    def __call__(self, run: RunFolder, *, root: DataRoot, attempt: int, log: RunLog, stop: StopSignal) -> State: ...


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which job to do."""

    job_id: str
    attempt: int
    gpus: tuple[str, ...]
    """UUIDs or indices of the devices it may see; empty: leave the environment as it is."""
    grace_seconds: float


def main(arguments: Sequence[str] | None = None, *, job: JobFunction | None = None) -> int:
    """Entry of the process. `job` replaces the real job in tests."""
    options = _parser().parse_args(arguments)
    process.die_with_parent(signal.SIGTERM)
    if os.getppid() != options.parent:
        return 0  # the daemon died before we could ask to be told
    process.become_subreaper()
    faulthandler.enable()
    assignment = _wait_warm(options) if options.warm else _from_options(options)
    if assignment is None:
        return 0
    if assignment.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assignment.gpus)
    root = DataRoot(options.data)
    with JobOutput(root, log_of(root.run(assignment.job_id), assignment.attempt)) as output:
        end = _do(root, assignment, job)
        _end_leftovers(spare=output.pid)
    return _EXIT_STATUS.get(end.state, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dropforge.daemon.runner", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data root")
    parser.add_argument("--parent", type=int, required=True, help="pid of the daemon; the runner ends with it")
    parser.add_argument("--id", help="job id")
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--gpus", default="", help="comma-separated devices")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds for a checkpoint after a request to stop")
    parser.add_argument("--warm", action="store_true", help="import first, then read the job from standard input")
    return parser


def _from_options(options: argparse.Namespace) -> Assignment:
    gpus = tuple(filter(None, options.gpus.split(",")))
    return Assignment(job_id=options.id, attempt=options.attempt, gpus=gpus, grace_seconds=options.grace)


def _wait_warm(options: argparse.Namespace) -> Assignment | None:
    """Import, then wait for a job. None when the daemon closed the pipe: it ends, or wants a fresh one."""
    for name in WARM_MODULES:
        importlib.import_module(name)
    line = sys.stdin.readline()
    if not line.strip():
        return None
    order = json.loads(line)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return Assignment(
        job_id=order["id"], attempt=order["attempt"], gpus=tuple(order["gpus"]), grace_seconds=order["grace"]
    )


def _do(root: DataRoot, assignment: Assignment, job: JobFunction | None) -> AttemptEnd:
    """Run the job and write exit.json, whatever happens in between."""
    run = root.run(assignment.job_id)
    started = time.monotonic()
    stop = StopSignal()
    _listen(run, assignment, stop)
    secrets = known_secrets(root)
    with Lease(run, attempt=assignment.attempt):
        log = RunLog(run, clean=partial(redact_all, secrets=secrets))
        try:
            state = (job or _real_job())(run, root=root, attempt=assignment.attempt, log=log, stop=stop)
            end = _end_of_partial(log) if state is State.PARTIAL else AttemptEnd(state=state)
        except DropforgeError as error:
            end = end_of_unexpected(error) if no_space_in(error) else _end_of(error)
        except Exception as error:  # noqa: BLE001  (the edge of the process: every fault must reach exit.json)
            traceback.print_exc()
            end = end_of_unexpected(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        freed = make_room(run) if end.no_space else 0
        with_reserve(root, log.flush)
        end = replace(end, message=redact(end.message, secrets), problems=tuple(redact_all(end.problems, secrets)))
        end = replace(end, freed=freed, seconds=round(time.monotonic() - started, 3), progress=attempts.progress(run))
        with_reserve(root, partial(attempts.write_end, run, assignment.attempt, end))
    return end


def _real_job() -> JobFunction:
    from dropforge.job import run_job

    return run_job


def _end_of(error: DropforgeError) -> AttemptEnd:
    print(error, file=sys.stderr)
    problems = tuple(asdict(problem) for problem in error.problems)
    message = "; ".join(_sentence(problem) for problem in problems)
    if isinstance(error, JobStopped):
        return AttemptEnd(state=State.INTERRUPTED, reason=error.reason, message=message)
    return AttemptEnd(state=State.FAILED, reason=error.reason, message=message, problems=problems)


def _end_of_partial(log: RunLog) -> AttemptEnd:
    """The job has said in status.json which exports failed."""
    problems = tuple(log.fields.get("problems") or ())
    message = "; ".join(_sentence(problem) for problem in problems)
    return AttemptEnd(state=State.PARTIAL, reason=Reason.EXPORT, message=message, problems=problems)


def _sentence(problem: dict[str, str]) -> str:
    return ": ".join(filter(None, (problem["what"], problem["why"])))


def _listen(run: RunFolder, assignment: Assignment, stop: StopSignal) -> None:
    """Turn signals into requests; guarantee the end after the grace period even if nobody is left to enforce it."""

    def on_terminate(number: int, frame: FrameType | None) -> None:
        reason = attempts.read_stop(run, assignment.attempt) or Reason.SHUTDOWN
        if not stop.requested:
            _start_deadline(assignment.grace_seconds)
        stop.request(reason, save=True)

    def on_checkpoint(number: int, frame: FrameType | None) -> None:
        stop.request_checkpoint()

    signal.signal(signal.SIGTERM, on_terminate)
    signal.signal(signal.SIGUSR1, on_checkpoint)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to the daemon, which asks us in order


def _start_deadline(seconds: float, *, end: Callable[[], None] | None = None) -> None:
    timer = threading.Timer(seconds, end or _kill_own_session)
    timer.daemon = True
    timer.start()


def _kill_own_session() -> None:
    print("the grace period is over; the process ends itself", file=sys.stderr, flush=True)
    process.kill_family(os.getpid())
    process.kill(os.getpid(), signal.SIGKILL)


def _end_leftovers(*, spare: int | None) -> None:
    """Data workers and tools that outlived the job are ended here, even those that left the session.

    `spare` is the log pump, which is still writing.
    """
    process.kill_family(os.getpid(), spare=() if spare is None else (spare,))


if __name__ == "__main__":
    sys.exit(main())
