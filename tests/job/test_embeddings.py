"""Continued pretraining with embeddings: they learn at a rate of their own, and come out in every export."""

from __future__ import annotations

import pytest
from dropforge.errors import SpecError
from dropforge.models.source import resolve_model
from dropforge.spec import ModelSpec
from dropforge.spec_check import check
from dropforge.states import State
from safetensors.torch import load_file

FULL = "method: cpt\nadapter: {modules_to_save: [embed_tokens, lm_head]}"


@pytest.mark.parametrize("model", ["builtin:tiny-llama", "builtin:tiny-qwen3"], ids=["apart", "tied"])
def test_embeddings_learn_slowly_and_are_merged(bench, make_spec, model):
    """Adam's steps are about as long as the rate: after three, a tenth of what LoRA's matrices have moved."""
    (bench.root.datasets / "book.txt").write_text("The cat sat on the mat. " * 60)
    text = make_spec(model=model, data="book.txt", extra=FULL, train="max_steps: 3, optim: adamw_torch, "
                     "lr_scheduler_type: constant, warmup_steps: 0, weight_decay: 0", export="merged")  # fmt: skip
    run = bench.run_folder(text)
    assert "embedding_learning_rate: 0.0001" in run.spec_resolved.read_text()
    assert bench.go(run) is State.SUCCEEDED
    base = load_file(resolve_model(ModelSpec(id=model), root=bench.root).path / "model.safetensors")
    adapter = load_file(bench.result(run).adapter / "adapter_model.safetensors")
    name = next(name for name in adapter if "embed_tokens" in name)
    moved = (adapter[name] - base["model.embed_tokens.weight"]).abs().max().item()
    assert 0 < moved < 3.3e-4
    assert max(value.abs().max().item() for name, value in adapter.items() if "lora_B" in name) > 1e-3
    merged = load_file(bench.result(run).merged / "model.safetensors")
    table = merged["model.embed_tokens.weight"].float()
    assert (table - adapter[name]).abs().max() < (table - base["model.embed_tokens.weight"]).abs().max()
    if model.endswith("qwen3"):  # one matrix, whether the export writes it once or twice
        assert (
            merged.get("lm_head.weight", merged["model.embed_tokens.weight"]) == merged["model.embed_tokens.weight"]
        ).all()


def test_a_rate_of_embeddings_that_are_not_trained(make_spec):
    with pytest.raises(SpecError, match="embedding_learning_rate needs trained embeddings"):
        check(make_spec(train="embedding_learning_rate: 1e-5").encode(), filename="job.yaml")


def test_the_recommended_rates(make_spec):
    text = "version: 1\nname: x\nmodel: builtin:tiny-llama\ndata: a.txt\n{}\nexport: [adapter]\n"
    train = check(text.format(FULL).encode(), filename="job.yaml").resolved.train
    assert (train.learning_rate, train.embedding_learning_rate) == (pytest.approx(5e-5), pytest.approx(5e-6))
    plain = check(text.format("method: cpt").encode(), filename="job.yaml").resolved.train
    assert plain.embedding_learning_rate is None


@pytest.mark.parametrize("full", [False, True])
def test_a_job_says_when_its_data_uses_untrained_tokens(bench, make_spec, full):
    """A base model whose chat markers were never trained, and a template that writes them."""
    import shutil

    from safetensors.torch import save_file

    folder = bench.root.models / "raw"
    shutil.copytree(resolve_model(ModelSpec(id="builtin:tiny-llama"), root=bench.root).path, folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name][4:6] = 0  # <|im_start|>, <|im_end|>
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    extra = "adapter: {modules_to_save: [embed_tokens, lm_head]}" if full else ""
    run = bench.run_folder(make_spec(model="raw", extra=extra, train="max_steps: 1"))
    assert bench.go(run) is State.SUCCEEDED
    said = [event["text"] for event in bench.events(run, "note") if "untrained" in event["text"]]
    assert len(said) == (0 if full else 1) and all("'<|im_start|>', '<|im_end|>'" in text for text in said)


def test_loftq_comes_out_as_plain_lora(bench, make_spec):
    """The saved adapter has lost its start, so that it fits the 16-bit base: nothing learnt is nothing changed."""
    text = make_spec(
        model="{id: 'builtin:tiny-llama', quantization: nf4}", train="max_steps: 1, warmup_steps: 0, weight_decay: 0",
        extra="adapter: {init_lora_weights: loftq, r: 8}", export="merged",
    ).replace("learning_rate: 1e-3", "learning_rate: 1e-12")  # fmt: skip
    run = bench.run_folder(text)
    assert bench.go(run) is State.SUCCEEDED
    adapter = load_file(bench.result(run).adapter / "adapter_model.safetensors")
    name = next(name for name in adapter if name.endswith("q_proj.lora_A.weight"))
    first, second = adapter[name], adapter[name.replace("lora_A", "lora_B")]
    assert first.shape[0] == 16 and first.abs().max() > 1e-3
    assert (second @ first).abs().max() < 1e-6
