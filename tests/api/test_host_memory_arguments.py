"""offload_embedding and tiled_mlp: what they do, when they cannot, and that it is said before weights are loaded."""

from __future__ import annotations

import pytest
import torch
from dropforge.errors import CommandError, DropforgeError

EMBEDDING = "model.embed_tokens.weight"


def load(name="builtin:tiny-llama", **arguments):
    from dropforge import FastLanguageModel

    arguments.setdefault("load_in_16bit", "full_finetuning" not in arguments)
    return FastLanguageModel.from_pretrained(str(name), max_seq_length=64, **arguments)


def adapted(model, **arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, **{"r": 4, **arguments})


def test_a_model_with_its_embedding_on_the_host_trains_generates_and_saves(tmp_path, rows):
    from dropforge import FastLanguageModel, add_new_tokens, model_report
    from dropforge.trainers import SFTConfig, SFTTrainer

    losses = {}
    for offload in (False, True):
        model, tokenizer = load(offload_embedding=offload)
        add_new_tokens(model, tokenizer, ["<a>"])
        model = adapted(model)
        base = model.get_base_model()
        assert (EMBEDDING in dict(base.named_parameters())) is not offload and EMBEDDING in base.state_dict()
        args = SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=3, report_to="none", per_device_train_batch_size=2,
            logging_steps=1, save_steps=2, use_cpu=True,
        )  # fmt: skip
        from datasets import Dataset

        texts = [row["conversations"][1]["value"] for row in rows]
        trainer = SFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": texts}), args=args
        )
        trainer.train()
        losses[offload] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert any("lie in host memory" in line for line in model_report(model)) is offload
        FastLanguageModel.for_inference(model)
        ids = tokenizer("Peru", return_tensors="pt")["input_ids"]
        assert model.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]
        model.save_pretrained(tmp_path / f"adapter-{offload}")
        again, _ = load(tmp_path / f"adapter-{offload}", resize_model_vocab=len(tokenizer), offload_embedding=offload)
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert losses[True] == losses[False]


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("builtin:tiny-llama", {"full_finetuning": True}, "full_finetuning trains the embedding"),
        ("builtin:tiny-qwen3", {}, "the head is the embedding's own matrix"),
    ],
)
def test_refused_before_weights_are_loaded(name, arguments, why, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(CommandError) as caught:
        load(name, offload_embedding=True, **arguments)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("api-offload-embedding", "offload_embedding") and why in problem.why


def test_refused_where_the_embedding_is_trained():
    model, _ = load(offload_embedding=True)
    for arguments in ({"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}):
        with pytest.raises(CommandError, match="cannot be held in host memory") as caught:
            adapted(model, **arguments)
        assert "embed_tokens in target_modules or modules_to_save" in caught.value.problems[0].why
    assert not any("lora_" in name for name, _ in model.named_parameters())
    with pytest.raises(DropforgeError) as error:  # LoRA on the embedding itself
        adapted(model, target_modules=r".*(q_proj|embed_tokens)")
    assert error.value.code == "api-offload-embedding" and "not a plain table" in error.value.problems[0].why


@pytest.mark.parametrize("argument", ["tiled_mlp", "unsloth_tiled_mlp"])
def test_a_tiled_mlp_reaches_the_layers(argument, caplog):
    from dropforge.fast.state import state_of

    model = adapted(load(kernels="required", **{argument: True})[0])
    assert state_of(model).session.engine.tiled_mlp is True
    assert "no effect" not in caplog.text
    assert state_of(adapted(load(kernels="required")[0])).session.engine.tiled_mlp is False
    adapted(load(**{argument: True})[0])
    assert "tiled_mlp has no effect: the hand-written layers are not in this model" in caplog.text
