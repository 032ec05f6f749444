"""An evaluation that lasts longer than many steps is no stall; one that hangs is (test 17)."""

from __future__ import annotations

from dataclasses import replace

from daemon_harness import FAST, Harness, drop, only_ticket, spec_text, status
from dropforge.daemon.stalls import StallWatch
from dropforge.paths import DataRoot


def test_batches_are_life_and_do_not_slow_the_pace() -> None:
    watch = StallWatch(floor=100)
    for step in range(5):
        assert watch.observe("a", 1, step=step, now=step * 1.0) is None
    now = 4.0
    for batch in range(1, 100):
        now += 50.0
        assert watch.observe("a", 1, step=4, batches=batch, now=now) is None
    assert watch.observe("a", 1, step=5, batches=99, now=now + 1) is None
    now += 1
    stalled = [watch.observe("a", 1, step=5, batches=99, now=now + second) for second in range(0, 140, 20)]
    assert stalled[-1] == 120, "a minute and a half of evaluation per batch did not become the pace"
    assert stalled[5] is None


def test_an_evaluation_that_hangs_is_a_stall() -> None:
    watch = StallWatch(floor=100)
    watch.observe("a", 1, step=0, now=0.0)
    watch.observe("a", 1, step=1, now=1.0)
    watch.observe("a", 1, step=1, batches=1, now=20.0)
    assert [watch.observe("a", 1, step=1, batches=1, now=now) for now in (60.0, 110.0, 130.0)] == [None, None, 110.0]


def test_a_job_with_a_long_evaluation_ends_well(root: DataRoot) -> None:
    """The evaluation lasts 50 times the budget; the daemon's clock runs faster than the wall's here."""
    drop(root, "job.yaml", spec_text("steps-3 delay-10 eval-600"))
    with Harness(root, options=replace(FAST, stall_seconds=0.6)) as harness:
        harness.until_in("done")
    assert status(root.run(only_ticket(root)[1]))["attempt"] == 1
