"""What becomes of a job after an attempt: a function of how it ended, who asked it to stop, and the deaths before.

Retrying blindly hides faults, giving up loses work. So: an attempt that ended by itself keeps its end; a stop on
request becomes what was requested; a death resumes, unless it repeats without progress (a poison job), which a person
must see. What may well pass by itself (a lost GPU, no network, a stall) is tried again after a growing delay.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from dropforge.daemon.attempts import AttemptEnd
from dropforge.errors import Reason
from dropforge.states import State

SAME_STEP_DEATHS = 2
"""Deaths of the job alone at the same step without a newer checkpoint, after which it is held."""
DEATHS_WITHOUT_CHECKPOINT = 5
"""Deaths of any kind without a newer checkpoint, after which it is held."""
RETRIES = 2
"""Automatic further tries for the reasons below, counted anew after every newer checkpoint."""
RETRY_DELAY_SECONDS = 60.0
RETRY_DELAY_GROWTH = 4
RETRIED_REASONS = {Reason.GPU_LOST: "the GPU was lost", Reason.OFFLINE: "the network could not be reached",
                   Reason.STALLED: "no step was made for too long"}  # fmt: skip
HELD_REASONS = frozenset({Reason.DISK, Reason.AUTH, Reason.REMOTE_CODE})
"""Faults that a person mends outside the job, after which the same job goes on."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    state: State
    reason: Reason | None
    message: str
    delay: float = 0.0
    """Seconds before it may start again."""


def judge(ends: Sequence[AttemptEnd], *, asked: Reason | None) -> Verdict:
    """Decide about the last of `ends`.

    Args:
        ends: ends of all attempts since the job was queued or retried, oldest first, not empty.
        asked: why somebody asked the last attempt to stop, None when nobody did.
    """
    last = ends[-1]
    if last.state in (State.FAILED, State.INTERRUPTED) and last.reason in RETRIED_REASONS and asked in _NOT_A_PERSON:
        return _try_again(ends)
    if last.no_space and last.state is State.FAILED and asked is None:
        return Verdict(
            state=State.INTERRUPTED, reason=Reason.DISK, message=f"{last.message}; goes on when there is room"
        )
    if last.state is State.FAILED and last.reason in HELD_REASONS:
        return Verdict(state=State.HELD, reason=last.reason, message=last.message)
    if last.state is not State.INTERRUPTED:
        return Verdict(state=last.state, reason=last.reason, message=last.message)
    if asked is Reason.USER:
        return Verdict(
            state=State.CANCELLED, reason=Reason.USER, message="cancelled; `retry` resumes from the checkpoint"
        )
    if asked is Reason.TIMEOUT:
        return Verdict(state=State.FAILED, reason=Reason.TIMEOUT,
                       message="the time limit of the job (resources.time_limit) is used up")  # fmt: skip
    if asked is Reason.OOM_HOST:
        return Verdict(state=State.FAILED, reason=Reason.OOM_HOST,
                       message="the machine was about to run out of memory, so the largest job was stopped; use a "
                               "smaller batch, a shorter max_seq_length or nf4. `retry` resumes it")  # fmt: skip
    if not last.died or asked is Reason.SHUTDOWN:
        return Verdict(state=State.INTERRUPTED, reason=last.reason or Reason.SHUTDOWN,
                       message="stopped with the daemon; resumes by itself")  # fmt: skip
    if last.reason is Reason.OOM_HOST:
        return Verdict(state=State.FAILED, reason=Reason.OOM_HOST, message=last.message)
    if _poison(ends):
        return Verdict(state=State.HELD, reason=last.reason,
                       message=f"{last.message}; it died repeatedly without progress, so it waits for a person: "
                               "read the log, then `retry` or `cancel` it")  # fmt: skip
    return Verdict(state=State.INTERRUPTED, reason=last.reason, message=f"{last.message}; resumes by itself")


_NOT_A_PERSON = (None, Reason.STALLED)


def _try_again(ends: Sequence[AttemptEnd]) -> Verdict:
    """Bounded: a fault that stays is the user's to see, and a hub that refuses must not be stormed."""
    last = ends[-1]
    assert last.reason is not None, "checked by the caller"
    since = [end for end in ends if end.progress.checkpoint >= last.progress.checkpoint]
    failures = sum(end.reason in RETRIED_REASONS for end in since)
    message = last.message or RETRIED_REASONS[last.reason]
    if failures > RETRIES:
        return Verdict(state=State.FAILED, reason=last.reason, message=f"{message}; given up after {failures} tries")
    delay = RETRY_DELAY_SECONDS * RETRY_DELAY_GROWTH ** (failures - 1)
    return Verdict(state=State.INTERRUPTED, reason=last.reason, delay=delay,
                   message=f"{message}; further try {failures} of {RETRIES} follows in {delay:g} s")  # fmt: skip


def _poison(ends: Sequence[AttemptEnd]) -> bool:
    deaths = _trailing_deaths(ends)
    newest = deaths[-1].progress
    stuck = [end for end in deaths if end.progress.checkpoint == newest.checkpoint]
    if len(stuck) >= DEATHS_WITHOUT_CHECKPOINT:
        return True
    alone = [end for end in stuck if not end.with_daemon and end.progress.step == newest.step]
    return not deaths[-1].with_daemon and len(alone) >= SAME_STEP_DEATHS


def _trailing_deaths(ends: Sequence[AttemptEnd]) -> list[AttemptEnd]:
    """Deaths at the end of the row; a stop on request in between is neither a death nor progress, so it is skipped."""
    deaths: list[AttemptEnd] = []
    for end in reversed(ends):
        if end.state is not State.INTERRUPTED:
            break
        if end.died:
            deaths.append(end)
    return deaths[::-1]


OUT_OF_MEMORY = (
    "the kernel killed the job because the machine (or the container's limit) ran out of memory; "
    "use a smaller batch, a shorter max_seq_length or a quantized model"
)


def explain_death(exit_status: int | None, *, out_of_memory: bool) -> tuple[Reason, str]:
    """Reason and message for a runner that left no exit.json.

    Args:
        exit_status: as in subprocess: minus the signal number, or the exit status; None when nobody could see it.
        out_of_memory: the kernel's oom_kill counter rose while the job ran.
    """
    if exit_status is None:
        return Reason.KILLED, "the job's process vanished together with the daemon"
    if exit_status == -signal.SIGKILL and out_of_memory:
        return Reason.OOM_HOST, OUT_OF_MEMORY
    if exit_status == -signal.SIGKILL:
        return Reason.KILLED, "the job's process was killed by someone (SIGKILL, and not for lack of memory)"
    if exit_status < 0:
        return Reason.CRASH, f"the job's process died of {_signal_name(-exit_status)}"
    return Reason.CRASH, f"the job's process ended with exit status {exit_status} and said nothing"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
