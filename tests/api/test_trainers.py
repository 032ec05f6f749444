"""Older argument names and places, one begin and one end token, the row limit, and which loss runs."""

from __future__ import annotations

import pytest
import torch
from dropforge.errors import CommandError, DataError

ARGUMENTS = {"output_dir": "outputs", "report_to": "none", "max_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture
def parts(rows):
    """(model with an adapter, tokenizer, data set of rendered texts)."""
    from datasets import Dataset
    from dropforge import FastLanguageModel
    from dropforge.chat_templates import standardize_sharegpt

    model, tokenizer = FastLanguageModel.from_pretrained(
        "builtin:tiny-llama", max_seq_length=64, load_in_4bit=False, kernels="required"
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False)
        for turns in standardize_sharegpt(Dataset.from_list(rows))["conversations"]
    ]
    return model, tokenizer, Dataset.from_dict({"text": texts})


def test_older_names():
    from dropforge.trainers import SFTConfig

    config = SFTConfig(
        max_seq_length=77, evaluation_strategy="no", warmup_ratio=0.1, save_safetensors=True, **ARGUMENTS
    )
    assert (config.max_length, config.warmup_steps) == (77, 0.1)
    with pytest.raises(CommandError, match="no argument 'lerning_rate'") as caught:
        SFTConfig(lerning_rate=1)
    assert caught.value.problems[0].fix == "did you mean 'learning_rate'?"
    with pytest.raises(CommandError, match="same argument with two values"):
        SFTConfig(max_length=5, max_seq_length=6)


def test_one_argument_in_two_places(parts):
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer, texts = parts
    with pytest.raises(CommandError, match="contradict each other"):
        SFTTrainer(
            model, SFTConfig(max_length=32, **ARGUMENTS), tokenizer=tokenizer, train_dataset=texts, max_seq_length=16
        )


def test_rows_are_as_long_as_the_model_was_told_and_never_longer(parts):
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer, texts = parts
    for given, expected in ((None, 64), (9, 9), (512, 64)):
        config = SFTConfig(**ARGUMENTS) if given is None else SFTConfig(max_length=given, **ARGUMENTS)
        trainer = SFTTrainer(model, config, tokenizer=tokenizer, train_dataset=texts)
        assert trainer.args.max_length == expected
        assert max(len(row) for row in trainer.train_dataset["input_ids"]) <= expected


def test_the_fused_loss_trains_like_the_models_own(parts):
    """Same data, same seed, patched and unpatched: the same losses; and the logits were never formed."""
    from dropforge.fast.language_model import state_of
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer, texts = parts
    start = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for kernels in ("required", "off"):
        model.load_state_dict(start)
        state = state_of(model)
        state.session.close()
        state.kernels = kernels
        config = SFTConfig(**ARGUMENTS | {"max_steps": 3}, logging_steps=1, learning_rate=1e-2, seed=7)
        trainer = SFTTrainer(model, config, tokenizer=tokenizer, train_dataset=texts)
        assert trainer._has_our_loss() is (kernels == "required")
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]


def test_inference_between_two_trainings(parts):
    """for_inference computes with the model's own code; for_training swaps back, also after a trainer wrapped it."""
    from dropforge import FastLanguageModel
    from dropforge.fast.language_model import state_of
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer, texts = parts
    ids = tokenizer("Capital of Peru?", return_tensors="pt")["input_ids"]
    SFTTrainer(model, SFTConfig(**ARGUMENTS), tokenizer=tokenizer, train_dataset=texts)
    FastLanguageModel.for_inference(model)
    with torch.no_grad():
        plain = model(ids).logits
    assert model.train()(ids, labels=ids).logits is not None
    FastLanguageModel.for_training(model)
    assert model(ids, labels=ids).logits is None
    state_of(model).session.close()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain)


def test_wrong_markers_are_an_error_and_not_a_loss_of_zero(parts):
    from dropforge.chat_templates import train_on_responses_only
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer, texts = parts
    trainer = SFTTrainer(model, SFTConfig(**ARGUMENTS), tokenizer=tokenizer, train_dataset=texts)
    with pytest.raises(DataError) as caught:
        train_on_responses_only(trainer, instruction_part="### User:", response_part="### Assistant:")
    assert caught.value.code == "api-no-responses"
    packed = SFTTrainer(model, SFTConfig(**ARGUMENTS), tokenizer=tokenizer, train_dataset=texts)
    packed.args.packing = True
    with pytest.raises(CommandError, match="packed"):
        train_on_responses_only(packed, instruction_part="a", response_part="b")


def test_labels_of_several_turns_and_of_a_cut_row(parts):
    from dropforge.chat_templates import response_labels

    _, tokenizer, _ = parts
    turns = [("user", "Capital of Peru?"), ("assistant", "Lima."), ("user", "Sure?"), ("assistant", "Yes, Lima é.")]
    text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in (len(ids), len(ids) - 3):
        labels = response_labels(
            ids[:cut], tokenizer, instruction="<|im_start|>user\n", response="<|im_start|>assistant\n"
        )
        kept = tokenizer.decode([label for label in labels if label != -100])
        assert kept.startswith("Lima.<|im_end|>\nYes, Lima")
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=False))
    assert "é" in tokenizer.decode([label for label in response_labels(
        ids, tokenizer, instruction="<|im_start|>user\n", response="<|im_start|>assistant\n") if label != -100])  # fmt: skip


def test_sharegpt_rows():
    from datasets import Dataset
    from dropforge.chat_templates import standardize_sharegpt

    good = Dataset.from_list(
        [{"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "a"}], "id": 1}]
    )
    done = standardize_sharegpt(good)
    assert done[0] == {
        "conversations": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}],
        "id": 1,
    }
    assert standardize_sharegpt(done)[0] == done[0]
    for row, code in (
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "api-sharegpt-role"),
        ({"conversations": [{"who": "x"}]}, "api-sharegpt"),
        ({"messages": []}, "api-sharegpt"),
    ):
        with pytest.raises(DataError) as caught:
            standardize_sharegpt(Dataset.from_list([row]))
        assert caught.value.code == code


def test_merged_model_computes_what_the_adapter_computes(parts, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer, _ = parts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.eval()
    checks = model.save_pretrained_merged(tmp_path / "out_16bit", tokenizer, save_method="merged_16bit")
    assert checks
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out_16bit", dtype=torch.float32)
    ids = tokenizer("Capital of Peru?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=0.1, rtol=0.05)
    with pytest.raises(CommandError, match="save_method"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, save_method="merged_2bit")
    with pytest.raises(CommandError, match="q9_9"):
        model.save_pretrained_gguf(tmp_path / "x", tokenizer, quantization_method="q9_9")
    assert not (tmp_path / "x").exists()


def one_text(row):
    return f"<s>{row['q']} {row['a']}"


def list_of_texts(rows):
    return [f"<s>{question} {answer}" for question, answer in zip(rows["q"], rows["a"], strict=True)]


def only_a_batch(rows):
    """One row alone makes it fail: its number is no list."""
    return [f"<s>{rows['q'][index]} {rows['a'][index]}" for index in range(len(rows["n"]))]


@pytest.mark.parametrize("function", [one_text, list_of_texts, only_a_batch])
def test_a_function_that_writes_the_texts(parts, function):
    """One row at a time as TRL has it, or a batch as older scripts have it; one begin and one end token either way."""
    from datasets import Dataset
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer, _ = parts
    rows = Dataset.from_dict({"q": ["Peru", "Japan"], "a": ["Lima", "Tokyo"], "n": [1, 1]})
    trainer = SFTTrainer(
        model, SFTConfig(**ARGUMENTS), tokenizer=tokenizer, train_dataset=rows, eval_dataset={"same": rows},
        formatting_func=function,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        SFTTrainer(
            model, SFTConfig(**ARGUMENTS), tokenizer=tokenizer, train_dataset=rows, formatting_func=lambda row: 1 / 0
        )
    with pytest.raises(KeyError, match="question"):
        SFTTrainer(
            model, SFTConfig(**ARGUMENTS), tokenizer=tokenizer, train_dataset=rows,
            formatting_func=lambda row: row["question"],
        )  # fmt: skip
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("Peru Lima", "Japan Tokyo")]
    assert trainer.train_dataset["input_ids"][:] == trainer.eval_dataset["same"]["input_ids"][:] == expected
    assert expected[0].count(tokenizer.bos_token_id) == 1


def test_a_stream_of_rows_trains(parts):
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer, texts = parts
    trainer = SFTTrainer(
        model, SFTConfig(**ARGUMENTS), tokenizer=tokenizer, train_dataset=texts.to_iterable_dataset()
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1
