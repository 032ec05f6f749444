"""What captured buckets take stands in the plan, and a result says of every bucket whether it was captured or why not."""

from __future__ import annotations

import pytest
from dropforge.fast_step.kernels import graph_line
from dropforge.fast_step.report import FastReport, Way
from dropforge.packing.shapes import BucketShape
from dropforge_kernels.modules.memory_plan import GIB, plan_memory
from dropforge_kernels.modules.model_shape import ModelShape, Training

SHAPE = ModelShape(layers=32, hidden=4096, intermediate=14336, heads=32, queries=4096, keys=1024, vocabulary=128256)


@pytest.mark.parametrize(("budget", "said"), [(120, "room for as much beside"), (45, "give it up for a moment")])
def test_the_plan_counts_captured_buckets(budget, said):
    ranks = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 16)
    training = Training(weights="bf16", ranks=ranks, optimizer="adamw_8bit", gradients_stay=True)
    plan = plan_memory(SHAPE, training, tokens=8192, document=200, budget=budget * GIB)
    assert plan.fits
    line = graph_line(plan)
    assert said in line
    assert f"{plan.predicted.activations / GIB:.1f} GiB" in line


def test_every_bucket_of_a_result_has_its_way_and_its_reason():
    report = FastReport()
    ways = {1024: (Way.CAPTURED, "", 7), 2048: (Way.EAGER, "", 1), 4096: (Way.EAGER, "", 4),
            8192: (Way.COMPILED, "dropout", 5)}  # fmt: skip
    for tokens, (way, reason, runs) in ways.items():
        bucket = report.bucket(BucketShape(tokens=tokens, documents=8, longest=512, counted=512))
        bucket.way, bucket.reason, bucket.runs = way, reason, runs
    rows = {row["tokens"]: row for row in report.as_dict()["buckets"]}
    assert {tokens: row["reason"] for tokens, row in rows.items()} == {
        1024: "", 2048: "met only once", 4096: "to be captured again", 8192: "dropout",
    }  # fmt: skip
    assert rows[8192]["way"] == "compiled"


def test_a_note_is_said_once():
    report = FastReport()
    for _ in range(3):
        report.note("graphs given up")
    assert report.notes == ["graphs given up"]
