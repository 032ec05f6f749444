"""Every way to load: precisions, stored quantisation, adapters, classes, positions, and the arguments of other libraries."""

from __future__ import annotations

import json

import pytest
import torch
from dropforge.errors import CommandError, ModelError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip


def load(name="builtin:tiny-llama", **arguments):
    from dropforge import FastLanguageModel

    arguments.setdefault("load_in_16bit", not {"load_in_4bit", "load_in_8bit", "full_finetuning"} & set(arguments))
    return FastLanguageModel.from_pretrained(name, **arguments)


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({"load_in_4bit": True}, "nf4 (4 bits)"),
        ({"load_in_4bit": None}, "nf4 (4 bits)"),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_16bit": True}, "float32"),
        ({"load_in_4bit": False}, "float32"),
        ({"load_in_16bit": True, "dtype": "bfloat16"}, "bfloat16"),
        ({"full_finetuning": True}, "float32"),
        ({"full_finetuning": True, "dtype": torch.bfloat16}, "bfloat16"),
    ],
)
def test_precisions_train(arguments, weights):
    from dropforge import FastLanguageModel, model_report

    model, tokenizer = load(**arguments)
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert f"weights: {weights}" in model_report(model)
    ids = tokenizer("Capital of Peru?", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    full = "full_finetuning" in arguments
    assert trained and all(("lora_" in name) != full and p.grad is not None for name, p in trained.items())
    assert all(p.dtype is torch.float32 for p in trained.values()) or full


def test_a_checkpoint_that_is_stored_in_4_bits(tmp_path):
    model, tokenizer = load(load_in_4bit=True)
    model.save_pretrained(tmp_path / "bnb-4bit")
    tokenizer.save_pretrained(tmp_path / "bnb-4bit")
    for arguments in ({"load_in_4bit": True}, {"load_in_4bit": None}):
        again, _ = load(str(tmp_path / "bnb-4bit"), **arguments)
        ours, theirs = model.model.layers[1].mlp.up_proj, again.model.layers[1].mlp.up_proj
        assert theirs.compute_dtype is torch.float32 and theirs.weight.dtype is torch.uint8
        assert torch.equal(ours(torch.ones(1, 256)), theirs(torch.ones(1, 256)))
    for name in ("load_in_8bit", "load_in_16bit", "full_finetuning"):
        with pytest.raises(CommandError) as caught:
            load(str(tmp_path / "bnb-4bit"), **{name: True})
        assert (caught.value.code, caught.value.problems[0].where) == ("api-two-precisions", name)


def test_arguments_of_other_libraries(caplog):
    model, _ = load(
        use_exact_model_name=True, random_state=1, max_lora_rank=64, gpu_memory_utilization=0.9, fast_inference=False,
        load_in_fp8=False, qat_scheme=None, fullgraph=True, device_map="balanced", use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    assert "fullgraph has no effect: nothing is compiled at loading" in caplog.text
    from dropforge import FastLanguageModel
    from dropforge.fast.state import state_of

    assert state_of(model).checkpointing is True
    for arguments, code, where in (
        ({"fast_inference": True}, "api-not-built", "fast_inference"),
        ({"load_in_fp8": "block"}, "api-not-built", "load_in_fp8"),
        ({"load_in_4bits": True}, "api-argument", "load_in_4bits"),
    ):
        with pytest.raises(CommandError) as caught:
            load(**arguments)
        problem = caught.value.problems[0]
        assert (problem.code, problem.where) == (code, where) and problem.fix
    with pytest.raises(CommandError, match="qat_scheme"):
        FastLanguageModel.get_peft_model(model, qat_scheme="int4")
    with pytest.raises(CommandError) as caught:
        FastLanguageModel.get_peft_model(model, target_module=["q_proj"])
    assert caught.value.problems[0].fix == "did you mean 'target_modules'?"


def test_positions_are_scaled_as_asked():
    model, _ = load(max_seq_length=8000, rope_scaling={"type": "yarn", "factor": 4.0})
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["original_max_position_embeddings"], rope["rope_theta"]) == ("yarn", 2048, 10000.0)
    assert model.config.max_position_embeddings == 8192
    model, _ = load(max_seq_length=8192, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    assert model.config.max_position_embeddings == 2048  # the length that the dynamic factor is measured from
    for scaling, code in (
        ({"rope_type": "linear", "factor": 2.0}, "api-length"),
        ({"rope_type": "linear", "factor": "2"}, "api-rope-scaling"),
        ({"rope_type": "ntk", "factor": 8.0}, "api-rope-scaling"),
    ):
        with pytest.raises(CommandError) as caught:
            load(max_seq_length=8192, rope_scaling=scaling)
        assert caught.value.code == code and "rope_scaling" in caught.value.problems[0].where


def test_a_model_that_is_scaled_already_counts_its_factor_from_the_start(checkpoint):
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128, "rope_theta": 5e5}  # fmt: skip
    folder = str(checkpoint("scaled", LlamaConfig(**SMALL, rope_parameters=rope)))
    model, _ = load(folder, max_seq_length=512, rope_scaling={"rope_type": "llama3", "factor": 4.0})
    assert model.config.max_position_embeddings == 512
    assert model.config.rope_parameters["original_max_position_embeddings"] == 128
    with pytest.raises(CommandError, match="beyond the 512 positions"):
        load(folder, max_seq_length=513, rope_scaling={"rope_type": "llama3", "factor": 4.0})


def test_an_adapter_under_models_and_one_of_another_model(tmp_path, monkeypatch):
    """Named like a hub id; and one that was trained on wider layers is refused before any weight is read, also where it
    does not say what it was trained on.
    """
    from dropforge import FastLanguageModel
    from transformers import AutoModelForCausalLM

    model, _ = load()
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    folder = tmp_path / "data" / "models" / "me" / "lora"
    model.save_pretrained(folder)
    again, _ = load("me/lora")
    assert any("lora_A" in name and p.requires_grad for name, p in again.named_parameters())

    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "builtin:tiny-qwen3", "auto_mapping": None}))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {name: torch.zeros(2, 320) if "lora_A" in name else value for name, value in tensors.items()}
    save_file(wide, folder / "adapter_model.safetensors")

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(ModelError) as caught:
        load("me/lora")
    assert caught.value.code == "adapter-wrong-size" and "320" in caught.value.problems[0].why
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "base_model_name_or_path"}))
    with pytest.raises(ModelError) as caught:
        load("me/lora")
    assert caught.value.code == "adapter-base-unknown"


def test_names_of_the_parts_of_a_fused_layer(checkpoint):
    from dropforge import FastLanguageModel
    from transformers import Phi3Config

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model, _ = load(str(checkpoint("phi", Phi3Config(**SMALL))), max_seq_length=256)
    with pytest.raises(CommandError) as caught:
        FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "o_proj"])
    assert caught.value.code == "api-target-parts" and "qkv_proj" in caught.value.problems[0].fix
    model = FastLanguageModel.get_peft_model(model, target_modules=names)
    assert set(model.peft_config["default"].target_modules) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_other_architectures(checkpoint):
    """No kernels, no seven projections, encoder-decoder, classification: all train through FastModel."""
    from dropforge import FastLanguageModel, FastModel
    from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, T5Config

    gpt = checkpoint("gpt", GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64))
    bert = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    bert = checkpoint("bert", bert, auto="AutoModelForMaskedLM")
    t5 = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, decoder_start_token_id=0)
    t5 = checkpoint("t5", t5, auto="AutoModelForSeq2SeqLM")
    with pytest.raises(ModelError) as caught:
        load(str(t5))
    assert (caught.value.code, caught.value.problems[0].fix) == (
        "model-no-class",
        "load it with FastModel.from_pretrained",
    )
    classify = {"auto_model": AutoModelForSequenceClassification, "num_labels": 3}
    for folder, arguments, task in ((gpt, {}, "CAUSAL_LM"), (bert, classify, "SEQ_CLS"), (t5, {}, "SEQ_2_SEQ_LM")):
        model, tokenizer = FastModel.from_pretrained(str(folder), load_in_16bit=True, **arguments)
        model = FastModel.get_peft_model(model, r=2)
        assert model.peft_config["default"].task_type == task
        batch = tokenizer("Capital of Peru?", return_tensors="pt")
        batch.pop("token_type_ids", None)
        model(**batch, labels=torch.tensor([2]) if task == "SEQ_CLS" else batch["input_ids"]).loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        FastLanguageModel.for_inference(model)
    assert model.base_model.model.config.use_cache is True
    model, _ = FastModel.from_pretrained(str(bert), load_in_16bit=True, **classify)
    assert model.config.num_labels == 3
