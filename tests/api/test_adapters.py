"""Adapters: which weights they train, how they start, what stays tied, and what can be done with them afterwards."""

from __future__ import annotations

import pytest
import torch
from dropforge.errors import CommandError, ModelError


def load(name="builtin:tiny-llama", **arguments):
    from dropforge import FastLanguageModel

    arguments.setdefault("load_in_16bit", not {"load_in_4bit", "load_in_8bit"} & set(arguments))
    return FastLanguageModel.from_pretrained(name, **arguments)


def adapted(model, **arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, r=arguments.pop("r", 4), **arguments)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def logits(model, tokenizer, text="Capital of Peru?"):
    with torch.no_grad():
        return model(tokenizer(text, return_tensors="pt")["input_ids"]).logits


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_embeddings_among_the_targets_are_trained_in_full_and_in_fp32(tmp_path):
    """In bf16 a step of 5e-6 would be rounded away; and the model computes with and without autocast."""
    from dropforge import FastLanguageModel

    model, tokenizer = load(dtype="bfloat16")
    model = adapted(model, target_modules=[*PROJECTIONS, "lm_head", "embed_tokens"])
    full = {name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert len(full) == 2 and all(p.dtype is torch.float32 for p in full.values())
    ids = tokenizer("Capital of Peru?", return_tensors="pt")["input_ids"]
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
            loss = model(input_ids=ids, labels=ids).loss
        assert hidden.dtype is torch.bfloat16
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in full.values())
    with torch.no_grad():
        for p in full.values():
            p += 0.01
    FastLanguageModel.for_inference(model)
    expected = logits(model, tokenizer)
    model.save_pretrained(tmp_path / "lora")
    again, _ = load(str(tmp_path / "lora"), dtype="bfloat16")
    assert trained(again) == trained(model)
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}
    FastLanguageModel.for_inference(again)
    assert torch.equal(logits(again, tokenizer), expected)


def test_a_tied_head_stays_tied_while_it_is_trained():
    from dropforge import FastLanguageModel

    model, tokenizer = load("builtin:tiny-qwen3")
    model = adapted(model, target_modules=["q_proj", "lm_head"])
    base = model.get_base_model()
    embedding = base.model.embed_tokens.modules_to_save["default"].weight
    head = base.lm_head
    assert embedding.requires_grad
    with torch.no_grad():
        embedding[:] = torch.randn_like(embedding)
    FastLanguageModel.for_inference(model)
    hidden = base.model(input_ids=torch.tensor([[5, 6]])).last_hidden_state
    assert torch.allclose(head(hidden), hidden @ embedding.T, atol=1e-4)
    assert (
        sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n) == embedding.numel()
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"layers_to_transform": [1]}, {1}),
        ({"layers_to_transform": 0, "target_modules": "all-linear"}, {0}),
        ({"finetune_last_n_layers": 1}, {1}),
        ({"layers_to_transform": [0], "finetune_mlp_modules": False}, {0}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, {1}),
    ],
)
def test_layers(arguments, expected):
    model, _ = load()
    names = trained(adapted(model, **arguments))
    assert names and {int(name.split("layers.")[1].split(".")[0]) for name in names} == expected


def test_layers_that_do_not_exist():
    model, _ = load()
    for arguments in ({"layers_to_transform": [0, 2]}, {"finetune_last_n_layers": 3}, {"finetune_last_n_layers": 0}):
        with pytest.raises(CommandError) as caught:
            adapted(model, **arguments)
        assert (caught.value.code, caught.value.problems[0].where) == ("api-layers", next(iter(arguments)))
    with pytest.raises(CommandError, match="both choose"):
        adapted(model, layers_to_transform=[0], finetune_last_n_layers=1)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("off", "part"), [("finetune_attention_modules", "mlp"), ("finetune_mlp_modules", "self_attn")]
)
def test_parts(off, part):
    model, _ = load()
    names = trained(adapted(model, **{off: False}))
    assert names and all(f".{part}." in name for name in names)


def test_no_part_is_left():
    model, _ = load()
    for arguments in (
        {"finetune_language_layers": False, "finetune_vision_layers": True},
        {"finetune_attention_modules": False, "finetune_mlp_modules": False},
        {"finetune_attention_modules": False, "target_modules": ["q_proj"]},
    ):
        with pytest.raises(CommandError) as caught:
            adapted(model, **arguments)
        assert caught.value.code == "api-switches"


def test_variants_of_lora():
    """rsLoRA's scale, DoRA's magnitudes, trained biases, ranks by name; and PEFT's own refusals with a fix."""
    model, _ = load()
    wrapped = adapted(model, r=16, lora_alpha=16, use_rslora=True, rank_pattern={"q_proj": 4})
    layer = wrapped.get_base_model().model.layers[0]
    assert layer.self_attn.o_proj.scaling["default"] == 4 and layer.self_attn.q_proj.r["default"] == 4
    model, _ = load()
    assert any("magnitude" in name for name in trained(adapted(model, use_dora=True)))
    model, _ = load()
    with pytest.raises(CommandError) as caught:
        adapted(model, layers_pattern="layers")
    assert caught.value.code == "api-lora" and "layers_to_transform" in caught.value.problems[0].why
    with pytest.raises(CommandError) as caught:
        adapted(model, init_lora_weights="pisa")
    assert (caught.value.code, caught.value.problems[0].where) == ("api-init", "init_lora_weights")


def test_the_same_seed_gives_the_same_matrices():
    first, second, third = (adapted(load()[0], random_state=seed) for seed in (1, 1, 2))
    name = next(name for name in trained(first) if "lora_A" in name)
    one, two, three = (dict(model.named_parameters())[name] for model in (first, second, third))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_loftq_starts_nearer_to_the_16_bit_model_than_nf4():
    from dropforge import FastLanguageModel

    model, tokenizer = load()
    truth = logits(model, tokenizer)
    errors = {}
    for init in (True, "loftq"):
        model, _ = load(load_in_4bit=True)
        model = adapted(model, r=64, lora_alpha=16, init_lora_weights=init)
        FastLanguageModel.for_inference(model)
        errors[init] = (logits(model, tokenizer) - truth).norm().item()
    assert errors["loftq"] < 0.7 * errors[True]
    model, _ = load()
    with pytest.raises(CommandError, match="not held in 4 bits") as caught:
        adapted(model, init_lora_weights="loftq")
    assert "load_in_4bit=True" in caught.value.problems[0].fix
    model, _ = load(load_in_4bit=True)
    with pytest.raises(CommandError, match="loftq_bits"):
        adapted(model, init_lora_weights="loftq", loftq_config={"loftq_bits": 2})


@pytest.mark.parametrize(("init", "four"), [("pissa", False), ("loftq", True)])
def test_merging_leaves_the_start_of_the_adapter_out(init, four, tmp_path):
    """Nothing learnt: the merged model is the base, although B A is not zero at the start."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(load_in_4bit=True) if four else load()
    model = adapted(model, r=8, init_lora_weights=init)
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    from dropforge.fast.saving import _save_trained

    folder, _ = _save_trained(model, tmp_path, base="builtin:tiny-llama")
    base, _ = load()
    expected = logits(base, tokenizer)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    assert isinstance(merged, AutoModelForCausalLM._model_mapping[type(merged.config)])
    assert torch.allclose(logits(merged, tokenizer), expected, atol=1e-4)


def test_scaling_an_adapter_is_averaging_with_the_base(tmp_path):
    from dropforge import average_models, average_weights, scale_adapter

    model, tokenizer = load()
    base_weights = {name: value.clone() for name, value in model.state_dict().items()}
    model = adapted(model, r=4, lora_alpha=8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    model.eval()
    before = logits(model, tokenizer)
    assert scale_adapter(model, 0.5) == 14
    half = logits(model, tokenizer)
    model.save_pretrained(tmp_path / "half")
    again, _ = load(str(tmp_path / "half"))
    assert torch.equal(logits(again.eval(), tokenizer), half)
    scale_adapter(model, 2.0)
    assert torch.equal(logits(model, tokenizer), before)

    merged = model.merge_and_unload()
    mixed = average_weights(base_weights, merged.state_dict(), weight=0.5)
    for name, folder in (
        ("base", base_weights),
        ("full", {name: value.clone() for name, value in merged.state_dict().items()}),
    ):
        merged.load_state_dict(folder)
        merged.save_pretrained(tmp_path / name)
    average_models(tmp_path / "base", tmp_path / "full", tmp_path / "mean")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "mean" / "model.safetensors")
    assert all(torch.equal(stored[name], mixed[name]) for name in stored)
    assert (tmp_path / "mean" / "config.json").is_file()
    merged.load_state_dict(mixed)
    assert torch.allclose(logits(merged, tokenizer), half, atol=1e-4)
    with pytest.raises(ModelError, match="not of one architecture"):
        average_weights(base_weights, {"x": torch.ones(1)})
    with pytest.raises(CommandError, match="no adapter"):
        scale_adapter(merged, 0.5)


def test_new_tokens_are_added_before_the_adapter():
    from dropforge import add_new_tokens

    model, tokenizer = load()
    assert add_new_tokens(model, tokenizer, ["<think>", "</think>"]) == 2
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer)
    model = adapted(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    with pytest.raises(CommandError, match="has adapters"):
        add_new_tokens(model, tokenizer, ["<more>"])


def test_full_fine_tuning_takes_no_adapter():
    from dropforge import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained("builtin:tiny-llama", full_finetuning=True)
    same = adapted(model)
    assert same is model and trained(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_head_learns_the_same_under_the_kernels(dtype):
    """The fused loss multiplies by the trained copy, in fp32 beside 16-bit activations too."""
    gradients, losses = [], []
    for kernels in ("required", "off"):
        model, tokenizer = load(dtype=dtype, kernels=kernels)
        model = adapted(model, target_modules=["q_proj", "lm_head", "embed_tokens"], use_gradient_checkpointing=False)
        ids = tokenizer("Capital of Peru? It is Lima.", return_tensors="pt")["input_ids"]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            out = model(input_ids=ids, labels=ids)
        assert (out.logits is None) == (kernels == "required")
        out.loss.backward()
        losses.append(out.loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    close = 2e-2 if dtype == "bfloat16" else 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=close)
    for name, grad in gradients[0].items():
        other = gradients[1][name]
        assert grad.dtype is other.dtype is torch.float32 and other.norm() >= 0
        assert (grad - other).norm() <= close * 2 * other.norm() + 1e-7, name
    assert any("lm_head" in name and grad.norm() > 0 for name, grad in gradients[0].items())
