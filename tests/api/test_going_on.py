"""Training goes on from an adapter: with the script's own get_peft_model call, and with vocabularies that have grown."""

from __future__ import annotations

import pytest
import torch
from dropforge.errors import CommandError

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(name="builtin:tiny-llama", **arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.from_pretrained(str(name), load_in_16bit=True, max_seq_length=64, **arguments)


def adapted(model, **arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, **{"r": 4, **arguments})


def saved(folder, **arguments):
    """An adapter whose B matrices are not zero."""
    model, tokenizer = load()
    model = adapted(model, **arguments)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("made", "called"),
    [
        ({}, {}),
        ({}, {"target_modules": SEVEN}),
        ({"target_modules": "all-linear"}, {"target_modules": SEVEN, "random_state": 9}),
        ({"target_modules": SEVEN}, {"target_modules": "all-linear"}),
        ({"target_modules": r".*q_proj"}, {"target_modules": ["q_proj"]}),
        ({"layers_to_transform": [1]}, {"finetune_last_n_layers": 1}),
        ({"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_the_same_adapter_once_more_trains_on(made, called, tmp_path, caplog):
    from dropforge import model_report

    weights = saved(tmp_path / "adapter", **made)
    model, _ = load(tmp_path / "adapter")
    assert f"adapter: goes on from {tmp_path / 'adapter'}" in model_report(model)
    same = adapted(model, **called)
    assert same is model and "has this adapter already, and it trains on" in caplog.text
    now = {name: p for name, p in same.named_parameters() if p.requires_grad}
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("called", "where", "why"),
    [
        ({"r": 8}, "r", "4 in the adapter, 8 asked for"),
        ({"lora_alpha": 32}, "lora_alpha", "16 in the adapter, 32 asked for"),
        ({"use_rslora": True}, "use_rslora", "False in the adapter, True asked for"),
        ({"target_modules": ["q_proj"]}, "target_modules", "14 modules (down_proj, gate_proj"),
        ({"finetune_mlp_modules": False}, "target_modules", "14 modules (down_proj, gate_proj"),
        ({"finetune_last_n_layers": 1}, "target_modules", "14 modules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "[] in the adapter, ['lm_head'] asked for"),
    ],
)
def test_another_adapter_is_refused_by_its_difference(called, where, why, tmp_path):
    saved(tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter")
    with pytest.raises(CommandError) as caught:
        adapted(model, **called)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("api-adapter-twice", where) and why in problem.why


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


@pytest.mark.parametrize("trained", [["embed_tokens", "lm_head"], ["embed_tokens"], None])
def test_new_tokens_survive_saving_going_on_and_merging(trained, tmp_path, monkeypatch):
    """Trained or frozen, the new rows are part of what is saved; PEFT alone would ask the hub whether there are any."""
    import peft.utils.save_and_load
    from dropforge import add_new_tokens

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *a, **k: pytest.fail("asked"))
    model, tokenizer = load()
    add_new_tokens(model, tokenizer, ["<think>", "</think>"], method="interpolation")
    model = adapted(model, target_modules=["q_proj"], modules_to_save=trained)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    ids = tokenizer("a <think>b</think> c")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    for folder in ("adapter", "merged"):
        again, tokens = load(tmp_path / folder)
        assert len(tokens) == len(tokenizer) == again.get_input_embeddings().weight.shape[0]
        close = 1e-4 if folder == "adapter" else 0.02  # a merged model is stored in 16 bits
        assert (logits(again, ids) - expected).abs().max() < close * expected.abs().max(), folder


def test_an_adapter_that_peft_alone_wrote_with_grown_embeddings_is_merged(tmp_path):
    """PEFT then writes every module trained in full three times."""
    from dropforge import add_new_tokens
    from dropforge.export.adapter_file import read_adapter
    from peft import PeftModel
    from safetensors import safe_open

    model, tokenizer = load()
    add_new_tokens(model, tokenizer, ["<think>"])
    model = adapted(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    PeftModel.save_pretrained(model, str(tmp_path), save_embedding_layers=True)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert any(".original_module." in name for name in names)
    changes = read_adapter(tmp_path).changes
    full = {name for name, change in changes.items() if change.replaced}
    assert full == {"lm_head", "model.embed_tokens"}


def test_a_run_goes_on_in_a_model_that_was_loaded_from_its_checkpoint():
    """As scripts do that name checkpoint-N both times: optimizer and schedule come from it as well."""
    from datasets import Dataset
    from dropforge.trainers import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": ["a cat", "a dog", "two cats", "three dogs"] * 2})
    arguments = {"output_dir": "run", "report_to": "none", "save_steps": 2, "logging_steps": 1, "max_steps": 4,
                 "per_device_train_batch_size": 2, "learning_rate": 1e-2}  # fmt: skip
    losses = []
    for resume in (None, "run/checkpoint-2"):
        model, tokenizer = load(resume or "builtin:tiny-llama")
        model = adapted(model)
        trainer = SFTTrainer(model, SFTConfig(**arguments), tokenizer=tokenizer, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-2:])
    assert losses[0] == losses[1]
