from __future__ import annotations

import signal

import pytest
from dropforge.daemon.attempts import AttemptEnd, Progress
from dropforge.daemon.verdict import DEATHS_WITHOUT_CHECKPOINT, RETRIED_REASONS, explain_death, judge
from dropforge.errors import Reason
from dropforge.states import State


def death(
    step: int = 0, checkpoint: int = 0, *, with_daemon: bool = False, reason: Reason = Reason.KILLED
) -> AttemptEnd:
    return AttemptEnd(state=State.INTERRUPTED, reason=reason, message="killed", died=True, with_daemon=with_daemon,
                      progress=Progress(step=step, checkpoint=checkpoint))  # fmt: skip


def stopped(step: int = 0) -> AttemptEnd:
    return AttemptEnd(state=State.INTERRUPTED, reason=Reason.SHUTDOWN, progress=Progress(step=step))


@pytest.mark.parametrize("asked", [None, Reason.USER, Reason.SHUTDOWN, Reason.TIMEOUT])
@pytest.mark.parametrize("state", [State.SUCCEEDED, State.PARTIAL, State.FAILED])
def test_an_end_of_its_own_stands_whoever_asked_to_stop(state: State, asked: Reason | None) -> None:
    assert judge([AttemptEnd(state=state, reason=Reason.CRASH)], asked=asked).state is state


@pytest.mark.parametrize("reason", [Reason.DISK, Reason.AUTH, Reason.REMOTE_CODE])
def test_what_a_person_can_mend_outside_the_job_is_held(reason: Reason) -> None:
    assert judge([AttemptEnd(state=State.FAILED, reason=reason)], asked=None).state is State.HELD


@pytest.mark.parametrize("end", [stopped(5), death(5)])
@pytest.mark.parametrize(
    ("asked", "state", "reason"),
    [(Reason.USER, State.CANCELLED, Reason.USER), (Reason.TIMEOUT, State.FAILED, Reason.TIMEOUT),
     (Reason.SHUTDOWN, State.INTERRUPTED, None)],
)  # fmt: skip
def test_a_stop_becomes_what_was_asked(end: AttemptEnd, asked: Reason, state: State, reason: Reason | None) -> None:
    verdict = judge([end], asked=asked)
    assert verdict.state is state
    assert reason is None or verdict.reason is reason


def test_one_death_resumes() -> None:
    assert judge([death(5)], asked=None).state is State.INTERRUPTED


def test_two_deaths_at_the_same_step_without_a_newer_checkpoint_are_held() -> None:
    verdict = judge([death(5, 4), death(5, 4)], asked=None)
    assert verdict.state is State.HELD
    assert verdict.reason is Reason.KILLED


@pytest.mark.parametrize("second", [death(6, 4), death(5, 5), death(9, 8)])
def test_progress_between_two_deaths_resumes(second: AttemptEnd) -> None:
    assert judge([death(5, 4), second], asked=None).state is State.INTERRUPTED


def test_a_stop_in_between_does_not_hide_a_poison_job() -> None:
    assert judge([death(5), stopped(3), death(5)], asked=None).state is State.HELD


def test_going_down_with_the_daemon_twice_is_no_poison_but_five_times_is() -> None:
    together = [death(5, with_daemon=True)]
    assert judge(together * 2, asked=None).state is State.INTERRUPTED
    assert judge(together * (DEATHS_WITHOUT_CHECKPOINT - 1), asked=None).state is State.INTERRUPTED
    assert judge(together * DEATHS_WITHOUT_CHECKPOINT, asked=None).state is State.HELD


def test_dying_at_different_steps_without_ever_saving_ends_held() -> None:
    deaths = [death(step) for step in (1, 2, 3, 4)]
    assert judge(deaths, asked=None).state is State.INTERRUPTED
    assert judge([*deaths, death(6)], asked=None).state is State.HELD


def test_lack_of_memory_is_not_tried_again() -> None:
    assert judge([death(reason=Reason.OOM_HOST)], asked=None).state is State.FAILED


@pytest.mark.parametrize(
    ("status", "out_of_memory", "reason", "words"),
    [(-9, True, Reason.OOM_HOST, "memory"), (-9, False, Reason.KILLED, "killed by someone"),
     (-signal.SIGSEGV, False, Reason.CRASH, "SIGSEGV"), (-signal.SIGSEGV, True, Reason.CRASH, "SIGSEGV"),
     (3, False, Reason.CRASH, "exit status 3"), (-64, False, Reason.CRASH, "SIGRTMAX"), (None, False, Reason.KILLED, "vanished")],
)  # fmt: skip
def test_deaths_are_explained(status: int | None, out_of_memory: bool, reason: Reason, words: str) -> None:
    found, message = explain_death(status, out_of_memory=out_of_memory)
    assert found is reason
    assert words in message


def passing(reason: Reason, checkpoint: int = 0, *, died: bool = False) -> AttemptEnd:
    state = State.INTERRUPTED if reason is Reason.STALLED else State.FAILED
    return AttemptEnd(state=state, reason=reason, died=died, progress=Progress(step=9, checkpoint=checkpoint))


@pytest.mark.parametrize("reason", RETRIED_REASONS)
def test_what_may_pass_is_tried_twice_more_with_a_growing_delay(reason: Reason) -> None:
    asked = Reason.STALLED if reason is Reason.STALLED else None
    verdicts = [judge([passing(reason)] * tries, asked=asked) for tries in (1, 2, 3)]
    assert [v.state for v in verdicts] == [State.INTERRUPTED, State.INTERRUPTED, State.FAILED]
    assert [v.delay for v in verdicts] == [60.0, 240.0, 0.0]
    assert {v.reason for v in verdicts} == {reason}


def test_a_newer_checkpoint_gives_new_tries() -> None:
    ends = [passing(Reason.STALLED, 5), passing(Reason.STALLED, 5), passing(Reason.STALLED, 8)]
    assert judge(ends, asked=Reason.STALLED).delay == 60.0


def test_a_stall_that_had_to_be_killed_is_no_poison_job() -> None:
    assert judge([passing(Reason.STALLED, died=True)] * 2, asked=Reason.STALLED).state is State.INTERRUPTED


@pytest.mark.parametrize("asked", [Reason.USER, Reason.TIMEOUT])
def test_nothing_is_tried_again_against_a_request(asked: Reason) -> None:
    assert judge([passing(Reason.STALLED, died=True)], asked=asked).state.ended
