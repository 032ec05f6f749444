"""The whole-trainer benchmark runs, at sizes a CPU can do, and its page says what the CSV holds."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from benchmarks._kernel_kinds import kernels_of, summary
from benchmarks.trainers import models, one, page, plan, run
from benchmarks.trainers.documents import documents


def test_lengths_are_those_of_the_named_data():
    lengths = sorted(len(row) for row in documents("alpaca", count=2000))
    assert 140 < lengths[1000] < 160
    assert lengths[0] >= 24
    assert lengths[-1] <= 2048
    assert {len(row) for row in documents("fixed", count=3)} == {8192}


@pytest.mark.filterwarnings("ignore")
def test_ours_runs_and_its_row_becomes_a_page(tmp_path):
    folder = models.write("tiny", tmp_path / "models")
    args = Namespace(engine="dropforge_packed", model=folder, data="tiny", steps=10, warm=2, documents=300, seconds=60.0,
                     length=256, profile=False, kernels=None)  # fmt: skip
    row = one.measure(args)
    assert row["valid_tok_s"] > 0
    assert row["grad_norm"] > 0
    assert row["filled"] > 0.9
    assert row["micro_batches"] == 1
    assert 0 < row["host_ms_per_micro"] <= 2 * row["wall_ms_per_micro"]
    table = tmp_path / "r.csv"
    run._append(table, {**row, "status": "ok", "commit": "abc"})
    run._append(table, {"engine": "unsloth_packed", "model": "tiny", "data": "tiny", "status": "more than 5 s"})
    assert [r["engine"] for r in csv.DictReader(table.read_text().splitlines())] == [
        "dropforge_packed",
        "unsloth_packed",
    ]
    kinds = summary([("nvjet_a", 30.0, 3)], step_ms=50.0, busy_ms=30.0)
    (tmp_path / "trainer-kernels-dropforge_packed-tiny-tiny.txt").write_text(kinds)
    page.page(table, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| dropforge_packed |" in text
    assert "failed: more than 5 s" in text
    assert "matrix product" in text and "longest kernels" not in text


def test_a_file_of_older_columns_is_widened(tmp_path):
    table = tmp_path / "r.csv"
    table.write_text("engine,model,data,status\nunsloth,tiny,tiny,ok\n")
    for _ in range(2):
        run._append(table, {"engine": "trl", "model": "tiny", "data": "tiny", "status": "ok", "host_share": 0.1})
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["engine"] for row in rows] == ["unsloth", "trl", "trl"]
    assert [row["host_share"] for row in rows] == ["", "0.1", "0.1"]


def test_a_plan_is_taken_up_where_it_ended(tmp_path):
    every = list(plan.pending(["4b", "0.6b"], []))
    assert [entry.engine for entry in every[:3]] == ["dropforge_packed", "unsloth_packed", "dropforge_packed"]
    table = tmp_path / "r.csv"
    for engine, status in (("dropforge_packed", "ok"), ("unsloth_packed", "more than 5 s")):
        run._append(table, {"engine": engine, "model": "qwen3-4b", "data": "alpaca", "status": status})
    rest = list(plan.pending(["4b", "0.6b"], [table, table, tmp_path / "none.csv"]))
    assert rest == every[1:]  # a failed run is run again, and of two equal ones one is left
    with pytest.raises(KeyError):
        list(plan.pending(["5b"], []))


def test_every_planned_run_can_be_run():
    for part, runs in plan.PARTS.items():
        assert runs, part
        for entry in runs:
            assert entry.engine in run.ENGINES
            assert entry.model in models.MODELS
            assert entry.steps >= 10


def test_busy_time_counts_overlapping_kernels_once():
    from torch.autograd import DeviceType

    def event(name, start, end, kind=DeviceType.CUDA, annotation=False):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end), device_type=kind, is_user_annotation=annotation,
            device_time_total=end - start, self_cpu_time_total=end - start,
        )  # fmt: skip

    events = [event("a", 0, 1000), event("a", 500, 1500), event("b", 600, 700), event("b", 5000, 6000),
              event("c", 0, 9000, DeviceType.CPU), event("d", 0, 9000, annotation=True)]  # fmt: skip
    kernels, busy = kernels_of(events)
    assert busy == pytest.approx(2.5)
    assert sorted(kernels) == [("a", 2.0, 2), ("b", pytest.approx(1.1), 2)]
    assert kernels_of(events, per=2)[1] == pytest.approx(1.25)
