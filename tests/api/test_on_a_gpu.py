"""The API on a GPU: the kernels, the engine and the fast step are in by default; QLoRA trains, goes on, and is saved."""

from __future__ import annotations

import math

import pytest
import torch

pytestmark = pytest.mark.gpu

ARGUMENTS = {"output_dir": "outputs", "report_to": "none", "logging_steps": 1, "max_steps": 5, "learning_rate": 2e-3,
             "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3,
             "optim": "adamw_8bit"}  # fmt: skip
TEXTS = [f"{number} " + "tale of a cat and a dog " * (number % 9) + "end." for number in range(40)]


def prepared(targets=None, **arguments):
    from dropforge import FastLanguageModel

    arguments.setdefault("load_in_4bit", not {"load_in_8bit", "load_in_16bit", "full_finetuning"} & set(arguments))
    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny-llama", 256, **arguments)
    return FastLanguageModel.get_peft_model(
        model, r=8, target_modules=targets, use_gradient_checkpointing="unsloth"
    ), tokenizer


def trainer_of(model, tokenizer, **arguments):
    from datasets import Dataset
    from dropforge.trainers import SFTConfig, SFTTrainer

    fast = arguments.pop("fast", True)
    return SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": TEXTS}), fast=fast,
        args=SFTConfig(**{**ARGUMENTS, **arguments}),
    )  # fmt: skip


def losses_of(trainer):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(map(math.isfinite, losses))
    return losses


@pytest.mark.parametrize("arguments", [{}, {"load_in_8bit": True}, {"load_in_16bit": True}, {"full_finetuning": True}])
def test_every_precision_trains_saves_and_goes_on(arguments, tmp_path):
    from dropforge import FastLanguageModel, model_report

    model, tokenizer = prepared(**arguments)
    assert next(model.parameters()).is_cuda
    report = model_report(model)
    assert any("linear_cross_entropy" in line for line in report), report
    trainer = trainer_of(model, tokenizer)
    trainer.train()
    assert len(losses_of(trainer)) == 5 and trainer.args.bf16 is True
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype is torch.float32 for p in trained)
    FastLanguageModel.for_inference(model)
    ids = tokenizer("tale of", return_tensors="pt").to("cuda")
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    if "full_finetuning" in arguments:
        return
    again, tokenizer = prepared_from(tmp_path / "outputs" / "checkpoint-5", **arguments)
    other = dict(model.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in again.named_parameters() if p.requires_grad)
    trainer_of(again, tokenizer, max_steps=1, output_dir="more").train()


def prepared_from(folder, **arguments):
    from dropforge import FastLanguageModel

    arguments = arguments or {"load_in_4bit": True}
    return FastLanguageModel.from_pretrained(str(folder), 256, **arguments)


def test_the_fast_step_is_taken_and_agrees_with_trls():
    losses = []
    for fast in (True, False):
        model, tokenizer = prepared(load_in_16bit=True)
        trainer = trainer_of(model, tokenizer, fast=fast, optim="adamw_torch", save_strategy="no")
        assert (trainer.fast is not None) is fast, trainer.report.notes
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_run_goes_on_with_its_optimizer():
    """Interrupted after three of five steps, it ends where the other ended."""
    straight, tokenizer = prepared()
    trainer_of(straight, tokenizer).train()
    resumed, tokenizer = prepared()
    trainer = trainer_of(resumed, tokenizer)
    trainer.train(resume_from_checkpoint="outputs/checkpoint-3")
    ours, theirs = dict(resumed.named_parameters()), dict(straight.named_parameters())
    for name, p in ours.items():
        if p.requires_grad:
            assert torch.allclose(p, theirs[name], atol=1e-4), name


def test_embeddings_and_head_train_in_fp32_beside_4_bits():
    model, tokenizer = prepared(["q_proj", "v_proj", "embed_tokens", "lm_head"])
    trainer = trainer_of(model, tokenizer, embedding_learning_rate=2e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    losses_of(trainer)
    full = [name for name in before if "modules_to_save" in name]
    after = dict(model.named_parameters())
    assert len(full) == 2
    for name in full:
        moved = (after[name] - before[name]).abs().max().item()
        assert after[name].dtype is torch.float32 and 0 < moved < 5 * 2e-4 * 1.2
    assert sorted({group["lr"] > 0 for group in trainer.optimizer.param_groups})


def test_loftq_on_the_gpu():
    from dropforge import FastLanguageModel

    errors = {}
    plain, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny-llama", 256, load_in_16bit=True)
    ids = tokenizer("tale of a cat", return_tensors="pt").to("cuda")["input_ids"]
    with torch.no_grad():
        truth = plain(ids).logits.float()
        for init in (True, "loftq"):
            model, _ = FastLanguageModel.from_pretrained("builtin:tiny-llama", 256, load_in_4bit=True)
            model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64, init_lora_weights=init)
            FastLanguageModel.for_inference(model)
            errors[init] = (model(ids).logits.float() - truth).norm().item()
    assert errors["loftq"] < 0.8 * errors[True]


def test_preference_trainers_take_trls_fused_head():
    from datasets import Dataset
    from dropforge.trainers import DPOConfig, DPOTrainer

    model, tokenizer = prepared()
    pairs = {
        "prompt": ["Peru?", "Italy?"] * 4,
        "chosen": [" Lima.", " Rome."] * 4,
        "rejected": [" Oslo.", " Paris."] * 4,
    }
    arguments = {**ARGUMENTS, "max_steps": 2, "save_strategy": "no"}
    trainer = DPOTrainer(
        model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict(pairs), args=DPOConfig(**arguments)
    )
    trainer.train()
    losses_of(trainer)
