"""Mixtures, the split, the report, and that the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from dropforge.data.mixture import split, weighted
from dropforge.data.process import Batch
from dropforge.data.table import TokenTable
from dropforge.data.tokenize import Tokens

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(200)]


def texts(bench, dataset):
    return [bench.learnt(row).removesuffix("<|im_end|>") for row in dataset]


def test_report(bench):
    name = bench.jsonl("a.jsonl", [*ROWS, {"prompt": "x", "completion": ""}])
    data = bench.prepare({"train": name, "system": "be brief", "eval": {"fraction": 0.1}})
    report = data.report
    assert (report.rows_read, report.rows, report.eval_rows, report.rows_dropped) == (201, 180, 20, 1)
    assert (len(data.train), len(data.eval)) == (180, 20)
    assert report.tokens == sum(len(row["input_ids"]) for row in data.train)
    assert report.trained_tokens == sum(label != -100 for row in data.train for label in row["labels"])
    assert report.longest == max(len(row["input_ids"]) for row in data.train)
    assert (report.system, report.end_of_turn, report.format) == ("be brief", "<|im_end|>", "prompt_completion")
    file = report.files[0]
    raw = (bench.folder / name).read_bytes()
    assert (file.path, file.sha256, file.bytes, file.rows) == (name, hashlib.sha256(raw).hexdigest(), len(raw), 201)
    assert json.loads(json.dumps(asdict(report)))["rows"] == 180
    assert bench.said[0] == "a.jsonl: format prompt_completion, because columns 'prompt' and 'completion': one question and " \
        "one answer per row"  # fmt: skip


def test_different_system_messages_are_not_a_common_one(bench):
    rows = [{"prompt": "a", "completion": "b", "system": text} for text in ("one", "two")]
    assert bench.prepare(bench.jsonl("a.jsonl", rows)).report.system is None
    rows = [{"prompt": "a", "completion": "b", "system": text} for text in ("one", "")]
    assert bench.prepare(bench.jsonl("b.jsonl", rows)).report.system is None


def test_few_rows_and_unused_columns_are_warned_about(bench):
    report = bench.prepare(bench.jsonl("a.jsonl", [ROWS[0] | {"id": 7, "source": "x"}])).report
    assert "a.jsonl: columns not used: id, source" in report.warnings
    assert any("only 1 row to train on" in warning for warning in report.warnings)


def test_weights_repeat_and_thin_out(bench):
    a = bench.jsonl("a.jsonl", ROWS[:10])
    b = bench.jsonl("b.jsonl", ROWS[10:20])
    data = bench.prepare([{"path": a, "weight": 2.5}, {"path": b, "weight": 0.3}])
    found = texts(bench, data.train)
    counts = [found.count(f"answer {i}") for i in range(20)]
    assert all(count in (2, 3) for count in counts[:10]) and sum(counts[:10]) == 25
    assert all(count in (0, 1) for count in counts[10:]) and sum(counts[10:]) == 3


def test_eval_rows_are_never_trained_on_even_when_they_repeat(bench):
    name = bench.jsonl("a.jsonl", ROWS[:20] * 5)
    data = bench.prepare({"train": [{"path": name, "weight": 3}], "eval": {"fraction": 0.2}})
    train, held_out = set(texts(bench, data.train)), set(texts(bench, data.eval))
    assert not train & held_out
    assert train | held_out == {f"answer {i}" for i in range(20)}
    assert (len(data.eval), len(data.train)) == (20, 240)


def test_eval_from_its_own_file(bench):
    data = bench.prepare({"train": bench.jsonl("a.jsonl", ROWS[:20]), "eval": bench.jsonl("e.jsonl", ROWS[50:55])})
    assert texts(bench, data.eval) == [f"answer {i}" for i in range(50, 55)]
    assert (data.report.rows, data.report.eval_rows) == (20, 5)


def test_a_slice_of_a_local_file(bench):
    name = bench.jsonl("a.jsonl", ROWS)
    data = bench.prepare([{"path": name, "split": "train[10:13]"}, {"path": name, "split": "train[:1]"}])
    assert texts(bench, data.train) == ["answer 10", "answer 11", "answer 0", "answer 12"]


def test_formats_may_differ_between_files(bench):
    text = bench.write("a.txt", "the sea was calm")
    data = bench.prepare([text, bench.jsonl("b.jsonl", ROWS[:2])])
    assert data.report.format == "text + prompt_completion"
    assert data.report.rows == 3


def test_train_on_everything(bench):
    data = bench.prepare({"train": bench.jsonl("a.jsonl", ROWS[:2]), "train_on": "everything"})
    assert data.train[0]["labels"] == data.train[0]["input_ids"]


def test_a_large_set_goes_to_the_work_folder_and_is_the_same(bench, monkeypatch, tmp_path):
    name = bench.jsonl("a.jsonl", ROWS)
    in_memory = bench.prepare({"train": name, "eval": {"fraction": 0.1}})
    monkeypatch.setattr("dropforge.data.table.MEMORY_TOKENS", 100)
    work = tmp_path / "work"
    work.mkdir()
    on_disk = bench.prepare({"train": name, "eval": {"fraction": 0.1}}, work=work)
    assert (work / "train.arrow").stat().st_size > 10_000
    assert on_disk.train.to_list() == in_memory.train.to_list()
    assert on_disk.eval.to_list() == in_memory.eval.to_list()


def test_another_seed_splits_otherwise(bench):
    data = {"train": bench.jsonl("a.jsonl", ROWS), "eval": {"fraction": 0.1}}
    assert texts(bench, bench.prepare(data, seed=1).eval) != texts(bench, bench.prepare(data, seed=2).eval)


PROGRAM = """
import hashlib, json, sys
from pathlib import Path
from dropforge.data import prepare_data
from dropforge.models.builtin import build_builtin
from dropforge.models.tokenizer import load_tokenizer
from dropforge.spec import Spec
folder = Path(sys.argv[1])
model = Path(sys.argv[2])
model.mkdir()
build_builtin("tiny-llama", model)
spec = Spec.model_validate({"version": 1, "name": "x", "model": "builtin:tiny-llama", "export": ["adapter"], "data":
    {"train": [{"path": "a.jsonl", "weight": 1.5}], "eval": {"fraction": 0.1}}})
data = prepare_data(spec, load_tokenizer(model)[0], locate=folder.joinpath)
rows = json.dumps([data.train.to_list(), data.eval.to_list()])
files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(model.iterdir())}
print(hashlib.sha256(rows.encode()).hexdigest(), json.dumps(files))
"""


def test_two_processes_give_the_same_rows_and_the_same_builtin_model(bench):
    bench.jsonl("a.jsonl", ROWS)
    out = []
    for number, seed in enumerate(("0", "12345")):
        command = [sys.executable, "-c", PROGRAM, str(bench.folder), str(bench.folder / f"model{number}")]
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": str(bench.folder)}
        out.append(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert out[0] == out[1]
    assert "model.safetensors" in out[0]


def table(count, *, distinct):
    """Rows of two tokens, of which `distinct` are different."""
    first = np.arange(count) % distinct
    rows = TokenTable()
    rows.add(
        Batch(
            ids=np.stack([first, np.ones(count)], axis=1).astype(np.int32).ravel(),
            labels=np.stack([np.full(count, -100), np.ones(count)], axis=1).astype(np.int32).ravel(),
            ends=np.arange(2, 2 * count + 2, 2),
            numbers=np.arange(1, count + 1),
            digests=first.astype(np.uint64),
            loose=first.astype(np.uint64),
            learnt=np.ones(count, dtype=np.int32),
            full=np.full(count, 2, dtype=np.int32),
            signatures=np.empty((0, 32), dtype=np.uint32),
        ),
        source=0,
        part=0,
    )
    return rows


@pytest.mark.parametrize(
    ("count", "distinct", "fraction", "held_out"),
    [(100, 100, 0.1, 10), (100, 10, 0.1, 10), (2, 2, 0.9, 1), (5, 1, 0.5, 0)],
)
def test_split_sizes(count, distinct, fraction, held_out):
    train, evaluation = split(table(count, distinct=distinct), fraction=fraction, seed=1)
    assert (len(train), len(evaluation)) == (count - held_out, held_out)
    assert sorted([*train, *evaluation]) == list(range(count))


def test_a_tiny_weight_keeps_one_row():
    rows = table(10, distinct=10)
    train, _ = split(rows, fraction=0.1, seed=1)
    assert len(weighted(train, sources=rows.sources, weights=[0.001], seed=1)) == 1


def test_the_first_token_is_never_predicted():
    assert Tokens(input_ids=[1, 2], labels=[1, 2]).learnt == 1
    assert Tokens(input_ids=[1, 2], labels=[1, -100]).learnt == 0
