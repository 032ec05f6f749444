"""Tokenising in processes: the same rows, in order, also when a worker dies; and the cache of tokenised files."""

from __future__ import annotations

import os
import signal

import pytest
from dropforge.data import blocks, prepare_data, workers
from dropforge.data import cache as cache_module
from dropforge.data.workers import RowPool, worker_count
from dropforge.spec import Spec

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3000)]


def spec_of(data):
    return Spec.model_validate(
        {"version": 1, "name": "t", "model": "builtin:tiny-llama", "data": data, "export": ["adapter"]}
    )


def prepare(bench, data, **options):
    return prepare_data(spec_of(data), bench.tokenizer, locate=bench.locate, log=bench.said.append, **options)


@pytest.fixture
def early(monkeypatch):
    """Processes start after the first small block, and the second one waits until they are ready."""
    monkeypatch.setattr(workers, "START_AFTER_ROWS", 1)
    monkeypatch.setattr(blocks, "LINE_BYTES", 10_000)
    start = RowPool._start

    def start_and_wait(pool):
        start(pool)
        for worker in pool._workers:
            assert worker.pipe.poll(60)

    monkeypatch.setattr(RowPool, "_start", start_and_wait)


@pytest.fixture
def done_there(monkeypatch):
    """Rows that a worker's result was taken for."""
    taken, take = [], RowPool._take

    def counted(pool, worker, number):
        result = take(pool, worker, number)
        taken.append(len(result[0]) if result else 0)
        return result

    monkeypatch.setattr(RowPool, "_take", counted)
    return taken


def test_processes_give_the_same_rows_in_the_same_order(bench, early, done_there):
    name = bench.jsonl("a.jsonl", [*ROWS, {"prompt": "x", "completion": ""}])
    there = prepare(bench, name, workers=2)
    assert sum(done_there) > len(ROWS) / 2
    here = prepare(bench, name, workers=1)
    assert there.train.to_list() == here.train.to_list()
    assert there.report == here.report


@pytest.mark.slow
def test_rows_that_are_no_lines_go_to_the_processes_too(bench, early, done_there, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 100)
    lines = ["prompt,completion", *(f'"question, {i}",answer {i}' for i in range(1500))]
    name = bench.write("a.csv", "\n".join(lines))
    there = prepare(bench, name, workers=2)
    assert sum(done_there) > 750
    assert there.train.to_list() == prepare(bench, name, workers=1).train.to_list()


@pytest.mark.slow
def test_a_shape_that_a_worker_has_not_seen_is_rendered_there(bench, early, done_there):
    """The first rows have one turn; the worker needs the whole tokenizer for the others."""
    more = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    rows = [{"messages": more[:2]}] * 1000 + [{"messages": more}] * 500
    name = bench.jsonl("a.jsonl", rows)
    there = prepare(bench, name, workers=2)
    assert sum(done_there) > 750
    assert there.train.to_list() == prepare(bench, name, workers=1).train.to_list()


@pytest.mark.parametrize("when", ["before it has rows", "with rows"])
def test_a_dying_worker_is_named_and_its_rows_are_done_here(bench, early, monkeypatch, when):
    start, give = RowPool._start, RowPool._give

    def start_and_kill(pool):
        start(pool)
        kill(pool._workers[0])

    def give_and_kill(pool, number, *arguments):
        worker = give(pool, number, *arguments)
        if worker is not None and worker.number == 1:
            kill(worker)
        return worker

    if when == "with rows":
        monkeypatch.setattr(RowPool, "_give", give_and_kill)
    else:
        monkeypatch.setattr(RowPool, "_start", start_and_kill)
    name = bench.jsonl("a.jsonl", ROWS)
    done = prepare(bench, name, workers=2)
    assert done.train.to_list() == prepare(bench, name, workers=1).train.to_list()
    warnings = [warning for warning in done.report.warnings if "data worker 1" in warning]
    assert len(warnings) == 1 and "killed by signal 9" in warnings[0] and "done again in this process" in warnings[0]


def kill(worker):
    if worker.process.poll() is None:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()


def test_all_workers_may_die(bench, early, monkeypatch):
    start = RowPool._start

    def start_and_kill(pool):
        start(pool)
        for worker in pool._workers:
            kill(worker)

    monkeypatch.setattr(RowPool, "_start", start_and_kill)
    done = prepare(bench, bench.jsonl("a.jsonl", ROWS), workers=2)
    assert done.report.rows == len(ROWS)
    assert sum("data worker" in warning for warning in done.report.warnings) == 2


@pytest.mark.slow
def test_a_bad_row_in_a_worker_is_the_same_error(bench, early):
    rows = [*ROWS, {"prompt": ["x"], "completion": {"a": 1}}]
    name = bench.jsonl("a.jsonl", rows)
    errors = [bench.error(name)]
    with pytest.raises(type(errors[0])) as caught:
        prepare(bench, name, workers=2)
    assert str(caught.value) == str(errors[0]) and "a.jsonl:3001" in str(caught.value)


def test_no_more_workers_than_memory_and_cpus_allow():
    assert worker_count(1, free_bytes=64 << 30) == 1
    assert worker_count(2, free_bytes=64 << 30) == 2
    assert worker_count(4, free_bytes=64 << 30) == 4
    assert worker_count(64, free_bytes=640 << 30) == 8
    assert worker_count(16, free_bytes=6 << 30) == 3
    assert worker_count(4, free_bytes=1 << 30) == 1


@pytest.fixture
def small(monkeypatch):
    """Every file is worth keeping."""
    monkeypatch.setattr(cache_module, "MIN_ROWS", 1)


def tokenised(bench):
    return sum("were tokenised by an earlier job" in line for line in bench.said)


def test_the_second_job_takes_the_tokens_of_the_first(bench, small, tmp_path):
    name = bench.jsonl("a.jsonl", [*ROWS[:600], {"prompt": "x", "completion": ""}])
    first = prepare(bench, name, cache=tmp_path / "cache")
    again = prepare(bench, name, cache=tmp_path / "cache")
    assert tokenised(bench) == 1
    assert again.train.to_list() == first.train.to_list() and again.report == first.report


CHANGES = {
    "content": lambda bench, spec: bench.jsonl("a.jsonl", ROWS[:601]),
    "length": lambda bench, spec: spec["model"].update(max_seq_length=64),
    "system": lambda bench, spec: spec["data"].update(system="Be brief."),
    "train_on": lambda bench, spec: spec["data"].update(train_on="everything"),
    "split": lambda bench, spec: spec["data"]["train"][0].update(split="train[:5]"),
    "evaluation": lambda bench, spec: spec["data"].update(eval={"fraction": 0.1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_tokens_is_part_of_the_key(bench, small, tmp_path, change):
    bench.jsonl("a.jsonl", ROWS[:600])
    spec = {
        "version": 1, "name": "t", "model": {"id": "builtin:tiny-llama"}, "export": ["adapter"],
        "data": {"train": [{"path": "a.jsonl"}]},
    }  # fmt: skip
    for _ in range(2):
        prepare_data(
            Spec.model_validate(spec), bench.tokenizer, locate=bench.locate, log=bench.said.append, cache=tmp_path / "c"
        )
        CHANGES[change](bench, spec)
    assert tokenised(bench) == 0


def test_another_chat_template_is_another_key(bench, small, tmp_path):
    name = bench.jsonl("a.jsonl", ROWS[:600])
    prepare(bench, name, cache=tmp_path / "c")
    old = bench.tokenizer.chat_template
    bench.tokenizer.chat_template = old.replace("assistant", "helper")
    try:
        prepare(bench, name, cache=tmp_path / "c")
    finally:
        bench.tokenizer.chat_template = old
    assert tokenised(bench) == 0


def test_a_damaged_entry_is_made_again(bench, small, tmp_path):
    name = bench.jsonl("a.jsonl", ROWS[:600])
    first = prepare(bench, name, cache=tmp_path / "c")
    next((tmp_path / "c").iterdir()).joinpath("ids.npy").write_bytes(b"no")
    assert prepare(bench, name, cache=tmp_path / "c").train.to_list() == first.train.to_list()
    assert tokenised(bench) == 0


def test_nothing_is_left_of_a_file_with_an_error(bench, small, tmp_path):
    bench.error(bench.jsonl("a.jsonl", [*ROWS[:600], {"prompt": ["x"], "completion": "y"}]))
    with pytest.raises(Exception, match="cannot be understood"):
        prepare(bench, "a.jsonl", cache=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_the_oldest_entries_go_first(bench, small, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "LIMIT_BYTES", 1)
    for number in range(3):
        prepare(bench, bench.jsonl(f"{number}.jsonl", ROWS[number : number + 600]), cache=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 1
