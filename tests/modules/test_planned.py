"""A plan reaches the engine whole; a retreat fits what is left, or says that the batch must shrink."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from dropforge_kernels.modules.memory_plan import GIB, plan_memory
from dropforge_kernels.modules.model_shape import ModelShape, Training
from dropforge_kernels.modules.planned import apply_plan, retreat
from dropforge_kernels.modules.policy import Keep

SHAPE = ModelShape(layers=32, hidden=4096, intermediate=14336, queries=4096, keys=1024, heads=32, vocabulary=128256)


@dataclass
class Recorder:
    calls: list = field(default_factory=list)

    def set_policies(self, policies, *, mlp_tile=None, store=None) -> None:
        assert store is not None or not any(keep.on_host for keep in policies)
        self.calls.append((list(policies), mlp_tile, store))


def planned(budget: int, host: int = 64 * GIB):
    return plan_memory(SHAPE, Training.of_rank(32, weights="nf4"), tokens=16384, budget=budget, host=host)


def test_the_store_is_there_when_something_goes_to_the_host_and_only_then():
    engine = Recorder()
    apply_plan(engine, planned(130 * GIB))
    apply_plan(engine, planned(12 * GIB))
    (large, _, none), (small, _, store) = engine.calls
    assert set(large) == {Keep.ALL} and none is None
    assert small[0].on_host and store is not None and store.capacity == 0, "host memory is taken at the first step"


def test_a_retreat_fits_what_another_process_left():
    engine, first = Recorder(), planned(130 * GIB)
    smaller = retreat(engine, first, usable=30 * GIB)
    assert smaller.predicted_peak <= 30 * GIB < first.predicted_peak
    assert engine.calls[-1][0] == list(smaller.policies)
    assert "stepping back" in smaller.lines()[0]


def test_a_retreat_goes_down_even_when_enough_seems_free():
    engine, plan = Recorder(), planned(130 * GIB)
    for _ in range(3):
        before = plan.predicted_peak
        plan = retreat(engine, plan, usable=130 * GIB)
        assert plan.predicted_peak <= 0.95 * before


def test_when_nothing_fits_the_engine_is_left_alone():
    engine, plan = Recorder(), planned(12 * GIB, host=0)
    with pytest.raises(ValueError, match=r"fit|micro-batch"):
        retreat(engine, plan, usable=6 * GIB)
    assert engine.calls == []
