"""BucketStep without a GPU: what happens when memory runs out half-way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dropforge.fast_step import step as module
from dropforge.fast_step.report import FastReport, Way
from dropforge.fast_step.step import BucketStep
from dropforge.packing.choose import choose_packing
from dropforge.packing.feed import Feeder
from dropforge.packing.rows import from_flat

LIMIT = 512


class Model:
    """Adds up the ids of all targets in a one-value gradient; runs out of memory above LIMIT tokens."""

    def __init__(self) -> None:
        self.weight = torch.zeros(1, requires_grad=True)
        self.weight.grad = torch.zeros(1)
        self.fits = LIMIT
        self.attempts = 0

    def loss(self, inputs):
        self.attempts += 1
        targets = inputs["shift_labels"]
        part = (targets * (targets > 0)).sum() / inputs["num_items_in_batch"]
        whole = (self.weight + 1.0) * part
        if inputs["input_ids"].shape[1] > self.fits:
            self.weight.grad.add_(1e6)  # half of a backward
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return whole.sum()


@pytest.fixture
def feeder():
    random = np.random.default_rng(0)
    lengths = random.integers(20, 90, 60)
    ids = random.integers(3, 97, int(lengths.sum()))
    rows = from_flat(ids, ids, lengths)
    feeder = Feeder(
        rows, choose_packing(rows, documents_per_step=20, per_micro=1, budget=2048, seed=1).plan, pad=0, pin=False
    )
    yield feeder
    feeder.close()


def step_of(model, feeder, **options):
    report = FastReport()
    step = BucketStep(model.loss, grads=[model.weight.grad], device=torch.device("cpu"), report=report,
                      split=feeder.split, **options)  # fmt: skip
    return step, report


def run(step, batch):
    step.begin()
    for micro in batch.micro:
        step.run(micro)
    return float(step.loss)


def test_a_bucket_that_does_not_fit_is_cut_and_loses_nothing(feeder):
    model, enough = Model(), Model()
    enough.fits = 1 << 20
    step, report = step_of(model, feeder)
    other, _ = step_of(enough, feeder)
    for number in range(2):
        batch = feeder.step(0, number)
        assert run(step, batch) == pytest.approx(run(other, batch))
        assert model.weight.grad.item() == pytest.approx(enough.weight.grad.item())
    ways = {bucket.shape.tokens: bucket.way for bucket in report.buckets.values()}
    assert all((way is Way.SPLIT) == (tokens > LIMIT) for tokens, way in ways.items())
    assert any("out of memory" in bucket.reason for bucket in report.buckets.values())


def test_a_model_that_can_need_less_is_asked_first(feeder):
    model = Model()

    def retreat():
        model.fits *= 2
        return f"now {model.fits}"

    step, report = step_of(model, feeder, retreat=retreat)
    run(step, feeder.step(0, 0))
    assert report.notes[0] == "now 1024"
    assert all(bucket.way is Way.EAGER for bucket in report.buckets.values())


def test_one_document_that_does_not_fit_ends_it(feeder):
    model = Model()
    model.fits = 0
    step, _ = step_of(model, feeder)
    with pytest.raises(torch.OutOfMemoryError, match="a document of"):
        run(step, feeder.step(0, 0))
    assert model.weight.grad.item() == 0.0


def test_gradients_too_large_to_copy_are_not_guessed_at(feeder, monkeypatch):
    """A half-written gradient that nobody kept a copy of must end the training, not be learnt from."""
    monkeypatch.setattr(module, "MOST_KEPT", 4)
    model = Model()
    model.fits = 0
    step, report = step_of(model, feeder)
    with pytest.raises(torch.OutOfMemoryError, match="says|Tried"):
        run(step, feeder.step(0, 0))
    assert not any(bucket.way is Way.SPLIT for bucket in report.buckets.values())
