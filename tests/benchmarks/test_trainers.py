"""The whole-trainer benchmark runs, at sizes a CPU can do, and its page says what the CSV holds."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from benchmarks.trainers import models, one, page, run
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
                     length=256, profile=False)  # fmt: skip
    row = one.measure(args)
    assert row["valid_tok_s"] > 0
    assert row["grad_norm"] > 0
    assert row["filled"] > 0.9
    table = tmp_path / "r.csv"
    run._append(table, {**row, "status": "ok", "commit": "abc"})
    run._append(table, {"engine": "unsloth_packed", "model": "tiny", "data": "tiny", "status": "more than 5 s"})
    assert [r["engine"] for r in csv.DictReader(table.open())] == ["dropforge_packed", "unsloth_packed"]
    page.page(table, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| dropforge_packed |" in text
    assert "failed: more than 5 s" in text
