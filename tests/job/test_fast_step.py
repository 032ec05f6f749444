"""The job path with the fast step, on a CPU: what a GPU job does, without graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dropforge import job, plan
from dropforge.checkpoints import CheckpointStore
from dropforge.errors import JobStopped, Reason
from dropforge.events import RunLog
from dropforge.files import read_json, read_json_lines
from dropforge.states import State
from dropforge.stop import StopSignal
from safetensors.torch import load_file

OPTIONS = {"train": "max_steps: 8, per_device_train_batch_size: 2, optim: adamw_torch"}


@pytest.fixture
def packed(monkeypatch):
    """Jobs pack as on a GPU."""
    made = plan.make_plan
    monkeypatch.setattr(job, "make_plan", lambda *a, **k: replace(made(*a, **k), token_budget=1024))


def rows_of(run, name):
    return [row[name] for row in read_json_lines(run.metrics) if name in row]


def test_a_packed_job_learns_like_a_padded_one_and_reports(bench, make_spec, packed, monkeypatch):
    run = bench.run_folder(make_spec(name="packed", **OPTIONS))
    assert bench.go(run) is State.SUCCEEDED
    monkeypatch.undo()
    plain = bench.run_folder(make_spec(name="plain", **OPTIONS))
    assert bench.go(plain) is State.SUCCEEDED
    assert rows_of(run, "loss") == pytest.approx(rows_of(plain, "loss"), rel=2e-5)
    engine = bench.provenance(run)["training"]["engine"]
    assert "share buckets" in engine["packing"]
    assert engine["buckets"]
    assert all(bucket["way"] == "eager" for bucket in engine["buckets"])
    assert bench.provenance(plain)["training"]["engine"] is None
    assert any("CUDA graphs need a GPU" in event["text"] for event in bench.events(run, "engine"))
    assert rows_of(run, "tokens_per_second")
    card = bench.result(run).model_card.read_text()
    assert "bucket shapes captured as CUDA graphs" in card
    assert all(bucket["reason"] and f"eager: {bucket['reason']}" in card for bucket in engine["buckets"])
    told = [event["text"] for event in bench.events(run, "engine")]
    assert len(told) == len(set(told))
    status = read_json(run.status)
    assert status["tokens_per_second"] > 0
    assert status["host_ms_per_micro_batch"] > 0


def test_what_keeps_a_job_from_packing_stands_on_its_card(bench, make_spec, packed):
    run = bench.run_folder(make_spec(train="max_steps: 2, neftune_noise_alpha: 5"))
    assert bench.go(run) is State.SUCCEEDED
    assert "plain training step: NEFTune" in bench.result(run).model_card.read_text()
    assert any("NEFTune" in event["text"] for event in bench.events(run, "engine"))


def test_every_weight_trained_over_flat_buffers_is_saved_and_exported(bench, make_spec, packed):
    """Parameters are views of one buffer then; files must hold each for itself."""
    extra = "adapter: {type: full}"
    run = bench.run_folder(make_spec(name="full", train="max_steps: 4, save_steps: 2", extra=extra, export="merged"))
    assert bench.go(run) is State.SUCCEEDED
    kept = CheckpointStore(run.checkpoints).all()
    assert [checkpoint.step for checkpoint in kept] == [2, 4]
    size = (kept[-1].path / "model.safetensors").stat().st_size
    values = sum(tensor.numel() for tensor in load_file(kept[-1].path / "model.safetensors").values())
    assert size < 4 * values + 100_000


def test_a_stopped_packed_job_ends_with_the_same_bytes(bench, make_spec, packed):
    whole = bench.run_folder(make_spec(name="whole", **OPTIONS))
    bench.go(whole)
    broken = bench.run_folder(make_spec(name="broken", **OPTIONS))
    stop = StopSignal()
    log = RunLog(broken)
    log.metrics = lambda **values: stop.request(Reason.SHUTDOWN) if values.get("step") == 3 else None
    with pytest.raises(JobStopped) as caught:
        bench.go(broken, stop=stop, log=log)
    assert caught.value.reason is Reason.SHUTDOWN
    assert bench.go(broken) is State.SUCCEEDED
    assert bench.adapter_hash(broken) == bench.adapter_hash(whole)
