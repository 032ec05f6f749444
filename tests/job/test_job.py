"""run_job from a spec to a result folder, with real training on tiny models."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from dropforge.errors import DataError, EnvironmentFault, ModelError, Reason, TrainingError
from dropforge.states import State
from safetensors.numpy import load_file


def test_a_lora_job_leaves_a_complete_checkable_result(bench, make_spec):
    run = bench.run_folder(make_spec(export="adapter, merged"))
    assert bench.go(run) is State.SUCCEEDED
    result = bench.result(run)
    for path in (result.adapter / "adapter_model.safetensors", result.merged / "model.safetensors", result.model_card,
                 result.provenance, result.spec_resolved, result.checksums, result.complete):  # fmt: skip
        assert path.exists(), path
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=result.path, capture_output=True)
    assert done.returncode == 0, done.stdout
    provenance = bench.provenance(run)
    assert provenance["model"]["id"] == "builtin:tiny-llama"
    assert provenance["data"]["files"][0]["sha256"]
    assert provenance["training"]["steps"] == 6
    assert provenance["libraries"]["torch"]
    assert str(bench.root.path) not in (result.adapter / "adapter_config.json").read_text()
    assert str(bench.root.path) not in result.provenance.read_text(), "a path of this machine helps nobody"


def test_the_resolved_spec_gives_the_same_adapter_bytes(bench, make_spec):
    first = bench.run_folder(make_spec(name="first"))
    bench.go(first)
    second = bench.run_folder(bench.result(first).spec_resolved.read_text().replace("name: first", "name: second"))
    bench.go(second)
    assert bench.adapter_hash(first) == bench.adapter_hash(second)
    config = "adapter_config.json"
    assert (bench.result(first).adapter / config).read_text() == (bench.result(second).adapter / config).read_text()


def test_another_seed_gives_other_bytes(bench, make_spec):
    hashes = set()
    for seed in (1, 2):
        run = bench.run_folder(make_spec(train=f"max_steps: 2, seed: {seed}"))
        bench.go(run)
        hashes.add(bench.adapter_hash(run))
    assert len(hashes) == 2


def test_the_loss_falls_and_every_lora_matrix_has_moved(bench, make_spec):
    run = bench.run_folder(make_spec(train="max_steps: 20"))
    bench.go(run)
    losses = [row["loss"] for row in map(__import__("json").loads, run.metrics.read_text().splitlines())]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    weights = load_file(bench.result(run).adapter / "adapter_model.safetensors")
    still = [name for name, value in weights.items() if "lora_B" in name and not value.any()]
    assert weights and still == []


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        ("{id: 'builtin:tiny-llama', quantization: nf4}", ""),
        ("builtin:tiny-qwen3", "adapter: {modules_to_save: [embed_tokens]}"),
        ("builtin:tiny-qwen3", "adapter: {use_dora: true, target_modules: [q_proj, down_proj]}"),
    ],
    ids=["qlora", "qwen3 with embeddings", "dora"],
)
def test_other_adapters_train_and_export(bench, make_spec, model, extra):
    run = bench.run_folder(make_spec(model=model, extra=extra, train="max_steps: 3"))
    assert bench.go(run) is State.SUCCEEDED
    assert (bench.result(run).adapter / "adapter_model.safetensors").exists()


def test_full_fine_tuning_exports_merged_weights_that_differ_from_the_base(bench, make_spec):
    run = bench.run_folder(make_spec(extra="adapter: {type: full}", export="merged", train="max_steps: 3"))
    assert bench.go(run) is State.SUCCEEDED
    result = bench.result(run)
    assert not result.adapter.exists()
    base = load_file(run.trained / "full" / "model.safetensors")
    assert base and (result.merged / "model.safetensors").exists()


def test_continued_pretraining_counts_every_token(bench, make_spec):
    (bench.root.datasets / "book.txt").write_text("The cat sat on the mat. " * 40)
    run = bench.run_folder(make_spec(data="book.txt", extra="method: cpt", train="max_steps: 2"))
    assert bench.go(run) is State.SUCCEEDED
    report = bench.provenance(run)["data"]
    # Only a first token has nothing before it to be predicted from.
    assert report["tokens"] - report["rows"] <= report["trained_tokens"] <= report["tokens"]


def test_evaluation_and_early_stopping(bench, make_spec):
    data = "{train: sums.jsonl, eval: {fraction: 0.2}}"
    train = "num_train_epochs: 40, learning_rate: 5e-2, early_stopping: {patience: 2}".replace(
        "learning_rate: 5e-2, ", ""
    )
    run = bench.run_folder(make_spec(data=data, train=train).replace("learning_rate: 1e-3", "learning_rate: 3e-2"))
    assert bench.go(run) is State.SUCCEEDED
    training = bench.provenance(run)["training"]
    assert training["eval_loss"] is not None
    assert training["epochs"] < 40, "it never stopped early"
    assert bench.events(run, "early_stop")


def test_a_failed_export_makes_the_job_partial_and_a_retry_only_repeats_it(bench, make_spec, monkeypatch, tmp_path):
    import dropforge.settings as module

    run = bench.run_folder(make_spec(export="adapter, 'gguf:q8_0'", train="max_steps: 2"))
    monkeypatch.setenv("DROPFORGE_LLAMA_CPP", str(tmp_path / "nothing"))
    module.settings.cache_clear()
    assert bench.go(run) is State.PARTIAL
    assert not bench.result(run).complete.exists()
    card = bench.result(run).model_card.read_text()
    assert "**failed**" in card
    trained = (run.trained / "record.json").stat().st_mtime_ns
    monkeypatch.delenv("DROPFORGE_LLAMA_CPP")
    module.settings.cache_clear()
    assert bench.go(run) is State.SUCCEEDED
    assert (run.trained / "record.json").stat().st_mtime_ns == trained, "it was trained again"
    assert bench.result(run).complete.exists()
    assert [entry["kind"] for entry in bench.provenance(run)["exports"]] == ["adapter", "gguf:q8_0"]


@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        ({"data": "nothing.jsonl"}, DataError, "data-missing"),
        ({"model": "no-such-folder"}, (ModelError, EnvironmentFault), None),
        ({"extra": "adapter: {target_modules: [q_prj]}"}, ModelError, "adapter-target-unknown"),
    ],
)
def test_bad_input_names_itself(bench, make_spec, text, error, code):
    run = bench.run_folder(make_spec(**text))
    with pytest.raises(error) as caught:
        bench.go(run)
    assert code is None or caught.value.code == code
    assert caught.value.problems[0].fix


def test_a_full_disk_is_refused_with_numbers_before_training(bench, make_spec, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    run = bench.run_folder(make_spec())
    with pytest.raises(EnvironmentFault) as caught:
        bench.go(run)
    assert caught.value.reason is Reason.DISK
    assert "needed" in str(caught.value) and "free" in str(caught.value)


def test_a_diverging_loss_is_named(bench, make_spec, monkeypatch):
    import torch
    from transformers import Trainer

    real = Trainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step >= 2 else loss

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    run = bench.run_folder(make_spec())
    with pytest.raises(TrainingError) as caught:
        bench.go(run)
    assert caught.value.reason is Reason.NAN_LOSS
    assert "step 3" in str(caught.value)
