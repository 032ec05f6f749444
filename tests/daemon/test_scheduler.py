from __future__ import annotations

from daemon_harness import ticket
from dropforge.daemon.scheduler import AGEING_SECONDS, Ages, Waiting, schedule

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


def test_waiting_gains_a_point_every_half_hour_so_nothing_starves() -> None:
    ages = Ages()
    old, new = ticket(1, priority=40), ticket(2, priority=50)
    assert ages.points([old], now=0.0) == {old.id: 0}
    assert starts(old, new, ages=ages.points([old, new], now=9 * AGEING_SECONDS)) == [(2, ("cpu",))]
    points = ages.points([old, new], now=10 * AGEING_SECONDS)
    assert points == {old.id: 10, new.id: 1}
    assert starts(old, new, ages=points) == [(2, ("cpu",))]
    assert starts(old, ticket(3, priority=50), ages=points) == [(1, ("cpu",))], "equal points: who came first"
    assert ages.points([new], now=11 * AGEING_SECONDS).keys() == {new.id}
    assert ages.points([old], now=11 * AGEING_SECONDS) == {old.id: 0}, "it had its turn in between"


def backfills(small, *, busy: dict[str, float | None], head: int = 2) -> bool:
    plan = schedule([ticket(1, gpus=head), small], gpus=GPUS, busy=busy, busy_for=busy)
    return [t.seq for t, _ in plan.starts] == [small.seq]


def test_a_small_job_passes_a_waiting_large_one_only_when_it_ends_before_it_could_start() -> None:
    busy: dict[str, float | None] = {"GPU-a": 600.0, "GPU-b": 900.0}
    assert backfills(ticket(2, time_limit=600.0), busy=busy)
    assert not backfills(ticket(2, time_limit=601.0), busy=busy)
    assert not backfills(ticket(2), busy=busy)
    assert backfills(ticket(2, time_limit=900.0), busy=busy, head=3)
    assert not backfills(ticket(2, time_limit=10.0, gpus=2), busy=busy), "only one slot is free"
    assert not backfills(ticket(2, time_limit=10.0), busy={**busy, "GPU-a": None}), "nobody knows when"


def test_slots_the_head_will_not_need_are_given_to_anybody_once() -> None:
    busy: dict[str, float | None] = {"GPU-a": 600.0, "GPU-b": 600.0}
    plan = schedule([ticket(1, gpus=2), ticket(2), ticket(3)], gpus=GPUS, busy=busy, busy_for=busy)
    assert [(t.seq, slots) for t, slots in plan.starts] == [(2, ("GPU-c",))]
    both = {"GPU-a": 600.0, "GPU-b": 600.0, "GPU-c": 600.0}
    four = (*GPUS, "GPU-d", "GPU-e")
    plan = schedule([ticket(1, gpus=4), ticket(2), ticket(3)], gpus=four, busy=both, busy_for=both)
    assert [t.seq for t, _ in plan.starts] == [2], "five slots at the time, four for the head: one to spare"
