"""The fast step behind SFTTrainer: the losses of TRL's own step, packed or not, for texts and for conversations."""

from __future__ import annotations

import pytest
from dropforge.errors import CommandError

ARGUMENTS = {"output_dir": "outputs", "report_to": "none", "save_strategy": "no", "logging_steps": 1, "seed": 11,
             "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 2, "optim": "adamw_torch",
             "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}  # fmt: skip
TEXTS = [f"{number} " + "tale of a cat and a dog " * (number % 5) + "end." for number in range(12)]


def prepared(kernels="off"):
    from dropforge import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny-llama", 128, load_in_16bit=True, kernels=kernels)
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def texts():
    from datasets import Dataset

    return Dataset.from_dict({"text": TEXTS})


def conversations():
    from datasets import Dataset

    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in TEXTS]
    return Dataset.from_dict({"messages": turns})


def train(dataset, fast, *, kernels="off", **arguments):
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer = prepared(kernels)
    trainer = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=dataset, args=SFTConfig(**{**ARGUMENTS, **arguments}), fast=fast
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("dataset", "kernels"), [(texts, "off"), (conversations, "required")])
def test_the_same_losses_as_the_plain_step(dataset, kernels):
    from dropforge.trainers import FastOptions

    _, plain = train(dataset(), False)
    trainer, fast = train(dataset(), FastOptions(), kernels=kernels)
    assert trainer.fast is not None and "share buckets" in trainer.report.packing
    assert fast == pytest.approx(plain, rel=2e-5) and len(fast) == 2


def test_loss_on_answers_with_any_template():
    """TRL wants generation marks in the template; here the same rows as after train_on_responses_only."""
    from dropforge.chat_templates import train_on_responses_only
    from dropforge.trainers import SFTConfig, SFTTrainer

    rows = []
    for only in (True, False):
        model, tokenizer = prepared()
        config = SFTConfig(**ARGUMENTS, assistant_only_loss=only)
        trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations(), args=config)
        if not only:
            train_on_responses_only(
                trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
            )
        rows.append([[t for t in row["labels"] if t != -100] for row in trainer.train_dataset])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(row[-1] == end and end not in row[:-1] for row in rows[0])
    assert [row[: row.index(end)] for row in rows[1]] == [row[:-1] for row in rows[0]]
    trainer.train()


def test_packing_asked_of_trl_is_ours():
    """As many rows of max_length per step, also without a GPU; and answers can still be masked."""
    from dropforge.chat_templates import train_on_responses_only
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer = prepared()
    config = SFTConfig(**ARGUMENTS, packing=True, max_length=96)
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations(), args=config)
    assert (trainer.args.packing, trainer.fast.packing, trainer.fast.rows_per_step) == (False, True, 6)
    assert len(trainer.train_dataset) == len(TEXTS)
    train_on_responses_only(trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n")
    trainer.train()
    assert "asked for" in trainer.report.packing


def test_a_machine_without_a_gpu_keeps_trls_step():
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer = prepared()
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=texts(), args=SFTConfig(**ARGUMENTS))
    assert trainer.args.use_cpu is False or trainer.fast is None
    with pytest.raises(CommandError, match="no argument 'fasst'"):
        SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=texts(), fasst=True)
