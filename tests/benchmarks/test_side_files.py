"""The small results files of the engine, each made by one command, tried at tiny sizes on the CPU."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
RESULTS = FOLDER / "results"


@pytest.fixture(autouse=True)
def steps_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def made(module, tmp_path):
    module.main(Namespace(out=tmp_path / "out.csv", device="cpu", commit="abc"))
    with (tmp_path / "out.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_policy_is_as_near_to_fp32_as_peft(tmp_path):
    from dropforge_kernels.modules.policy import Keep
    from steps import slices

    rows = {row["who"]: row for row in made(slices, tmp_path)}
    assert list(rows) == [*map(str, Keep), "peft_autocast"]
    assert {row["commit"] for row in rows.values()} == {"abc"}
    usual = float(rows["peft_autocast"]["worst_gradient_relative"])
    for row in rows.values():
        assert 0 < float(row["worst_gradient_relative"]) <= 2 * usual + 1e-3
        assert float(row["least_cosine"]) > 0.999 and float(row["loss_relative"]) < 2e-3


def test_products_are_all_timed(tmp_path):
    from steps import products

    (row,) = made(products, tmp_path)
    assert row["projection"] == "qkv" and row["tokens"] == "32"
    assert all(float(value) > 0 for name, value in row.items() if name.endswith("_us"))


@pytest.mark.parametrize(("module", "file"), [("slices", "engine-parity"), ("products", "lora-products")])
def test_the_files_in_the_repository_have_these_columns(module, file):
    from importlib import import_module

    found = sorted(RESULTS.glob(f"*-{file}.csv"))
    assert found
    with found[-1].open() as opened:
        assert tuple(next(csv.reader(opened))) == import_module(f"steps.{module}").COLUMNS
