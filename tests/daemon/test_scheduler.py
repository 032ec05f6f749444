from __future__ import annotations

from daemon_harness import ticket
from dropforge.daemon.scheduler import Waiting, schedule

GPUS = ("GPU-a", "GPU-b", "GPU-c")


def starts(*tickets, **options) -> list[tuple[int, tuple[str, ...]]]:
    return [(t.seq, slots) for t, slots in schedule(tickets, **{"gpus": (), "busy": (), **options}).starts]


def waits(*tickets, **options) -> dict[int, str]:
    return {t.seq: w.kind for t, w in schedule(tickets, **{"gpus": (), "busy": (), **options}).waiting}


def test_order_of_acceptance_one_at_a_time_on_the_cpu() -> None:
    assert starts(ticket(3), ticket(1), ticket(2)) == [(1, ("cpu",))]
    assert waits(ticket(3), ticket(1), ticket(2)) == {2: "slot", 3: "priority"}
    assert starts(ticket(1), busy={"cpu"}) == []


def test_higher_priority_goes_first() -> None:
    assert starts(ticket(1), ticket(2, priority=90), ticket(3, priority=10)) == [(2, ("cpu",))]


def test_each_gpu_is_a_slot() -> None:
    assert starts(*(ticket(n) for n in range(1, 6)), gpus=GPUS) == [(1, ("GPU-a",)), (2, ("GPU-b",)), (3, ("GPU-c",))]
    assert starts(ticket(1), gpus=GPUS, busy={"GPU-a", "GPU-b"}) == [(1, ("GPU-c",))]
    assert starts(ticket(1, gpus="all"), gpus=GPUS) == [(1, GPUS)]


def test_a_large_job_at_the_head_is_not_overtaken() -> None:
    assert starts(ticket(1, gpus=3), ticket(2), gpus=GPUS, busy={"GPU-a"}) == []
    assert waits(ticket(1, gpus=3), ticket(2), gpus=GPUS, busy={"GPU-a"}) == {1: "slot", 2: "priority"}


def test_a_job_that_can_never_fit_says_so_and_steps_aside() -> None:
    plan = schedule([ticket(1, gpus=4), ticket(2)], gpus=GPUS, busy=())
    assert [t.seq for t, _ in plan.starts] == [2]
    assert plan.waiting[0][1].text == "asks for 4 GPUs, this machine has 3 GPUs"
    assert waits(ticket(1, gpus=2)) == {1: "gpu"}


def test_pause_stops_every_start_with_its_reason() -> None:
    plan = schedule(
        [ticket(1), ticket(2)], gpus=(), busy=(), blocked=Waiting(kind="pause", text="paused (control/pause)")
    )
    assert plan.starts == ()
    assert {w.text for _, w in plan.waiting} == {"paused (control/pause)"}


def test_a_job_that_rests_after_a_fault_steps_aside_and_says_for_how_long() -> None:
    plan = schedule(
        [ticket(1), ticket(2)], gpus=(), busy=(), resting={ticket(1).id: Waiting(kind="backoff", text="42 s")}
    )
    assert [t.seq for t, _ in plan.starts] == [2]
    assert [(t.seq, w.kind) for t, w in plan.waiting] == [(1, "backoff")]
    assert "42 s" in plan.waiting[0][1].text
