"""No argument is passed over in silence: it works, it is refused, or a log line says why it has no effect."""

from __future__ import annotations

import inspect

import pytest
import torch
from dropforge.fast.extras import ADAPTER, LOADING, SAVING, SAVING_LOCALLY

TEXTS = ["a cat and a dog", "a dog", "two cats and three dogs met", "the end"]
ARGUMENTS = {"output_dir": "outputs", "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_steps": 2}


def load(**arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.from_pretrained("builtin:tiny-llama", load_in_16bit=True, max_seq_length=64, **arguments)


def prepared(**arguments):
    from dropforge import FastLanguageModel

    model, tokenizer = load()
    return FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"], **arguments), tokenizer


def trainer_of(model, tokenizer, *, kind=None, config=None, **arguments):
    from datasets import Dataset
    from dropforge.trainers import SFTConfig, SFTTrainer

    return (kind or SFTTrainer)(
        model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": TEXTS}),
        args=SFTConfig(**ARGUMENTS, **(config or {})), **arguments,
    )  # fmt: skip


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_every_further_argument_has_one_of_a_refusal_a_reason_and_a_meaning():
    for name, extra in (LOADING | ADAPTER | SAVING_LOCALLY).items():
        assert sum(map(bool, (extra.refuse, extra.note, extra.meaning))) == 1, name


def test_each_says_so(caplog):
    from dropforge import FastLanguageModel

    model, _ = load(**{name: 1 for name, extra in LOADING.items() if extra.note})
    FastLanguageModel.get_peft_model(model, **{name: 1 for name, extra in ADAPTER.items() if extra.note})
    for name, extra in (LOADING | ADAPTER).items():
        assert not extra.note or f"{name} has no effect: {extra.note}" in caplog.text


def test_arguments_of_saving(tmp_path, caplog):
    """Seeds of scripts: lower maximum_memory_usage when memory is short; push with the call that saves."""
    from dropforge.errors import CommandError

    model, tokenizer = prepared()
    model.save_pretrained_merged(
        tmp_path / "m", tokenizer, save_method="lora", maximum_memory_usage=0.5, token="x", safe_serialization=True
    )
    assert "maximum_memory_usage has no effect: exports read and write tensor by tensor" in caplog.text
    assert "token has no effect: nothing is pushed" in caplog.text and "safe_serialization" not in caplog.text
    assert (tmp_path / "m" / "adapter_model.safetensors").is_file()
    for call in (model.save_pretrained_merged, model.save_pretrained_gguf, model.push_to_hub_merged):
        with pytest.raises(CommandError, match="has no argument 'save_metod'"):
            call("x/y", tokenizer, save_metod="lora")
    with pytest.raises(CommandError) as caught:
        model.save_pretrained_gguf(tmp_path / "g", tokenizer, push_to_hub=True)
    assert "push_to_hub_gguf" in caught.value.problems[0].fix
    assert "token" not in SAVING


def test_values_that_ask_for_nothing_pass_in_silence(caplog):
    load(**dict.fromkeys(LOADING, False))
    assert "has no effect" not in caplog.text


def test_arguments_of_configs(caplog):
    from dropforge.trainer_arguments import WITHOUT_EFFECT
    from dropforge.trainers import SFTConfig

    SFTConfig(output_dir="x", overwrite_output_dir=True, save_safetensors=True)
    for name in ("overwrite_output_dir", "save_safetensors"):
        assert f"{name} has no effect: {WITHOUT_EFFECT[name]}" in caplog.text


def test_recomputation_is_the_models_and_evaluation_rounds_nothing(caplog):
    """transformers would cast the trained weights to fp16 in place."""
    model, tokenizer = prepared(use_gradient_checkpointing=False)
    trainer = trainer_of(model, tokenizer, config={"gradient_checkpointing": True, "fp16_full_eval": True})
    assert "gradient_checkpointing=True has no effect: use_gradient_checkpointing" in caplog.text
    assert "fp16_full_eval has no effect" in caplog.text and not trainer.args.gradient_checkpointing
    trainer.evaluate(trainer.train_dataset)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_choice_at_loading_holds_where_get_peft_model_makes_none(caplog):
    from dropforge import FastLanguageModel
    from dropforge.fast.state import state_of

    for at_loading, later, expected in ((False, None, False), (True, False, False), ("unsloth", None, True)):
        model, _ = load(use_gradient_checkpointing=at_loading)
        model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=later, max_seq_length=4096)
        assert state_of(model).checkpointing is expected and state_of(model).max_seq_length == 64
    assert "max_seq_length=4096 has no effect: the model was loaded with max_seq_length=64" in caplog.text


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("subclass", "Mine has its own compute_loss"),
        ("compute_loss_func", "the script has its own loss"),
        ("data_collator", "the script has its own data collator"),
        ("optimizers", "the script has its own optimizer"),
    ],
)
def test_parts_of_the_scripts_own_are_used_and_not_gone_around(part, said, caplog):
    """The fast step knows neither; it would train something else than the script says."""
    from dropforge.trainers import FastOptions, SFTTrainer
    from transformers import DataCollatorForSeq2Seq

    called = []

    class Mine(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            called.append("subclass")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    class Collator(DataCollatorForSeq2Seq):
        def __call__(self, features, return_tensors=None):
            called.append("data_collator")
            rows = [{**row, "labels": row["input_ids"]} for row in features]
            return super().__call__(rows, return_tensors)

    def own_loss(outputs, labels, num_items_in_batch=None):
        called.append("compute_loss_func")
        return outputs.logits.float().mean()

    class SGD(torch.optim.SGD):
        def step(self, closure=None):
            called.append("optimizers")
            return super().step(closure)

    model, tokenizer = prepared()
    own = {
        "subclass": {"kind": Mine},
        "compute_loss_func": {"compute_loss_func": own_loss},
        "data_collator": {"data_collator": Collator(tokenizer)},
        "optimizers": {"optimizers": (SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), None)},
    }[part]
    trainer = trainer_of(model, tokenizer, fast=FastOptions(), **own)
    assert f"TRL's own step trains: {said}" in caplog.text
    losses_of(trainer)
    assert part in called


def test_another_loss_is_trained_on_a_cpu_too():
    """loss_type="dft" weighs each token by its probability: far below the plain loss of an untrained model."""
    plain = losses_of(trainer_of(*prepared(), config={"loss_type": "nll"}))
    weighed = losses_of(trainer_of(*prepared(), config={"loss_type": "dft"}))
    assert plain[0] > 5 and 0 < weighed[0] < 0.1


def test_rows_that_the_script_prepares_are_left_alone():
    from datasets import Dataset
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer = prepared()
    rows = Dataset.from_dict({"text": TEXTS, "input_ids": [[5, 6, 7]] * 4, "labels": [[5, 6, 7]] * 4})
    config = SFTConfig(**ARGUMENTS, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=True)
    trainer = SFTTrainer(model, config, tokenizer=tokenizer, train_dataset=rows)
    assert trainer.train_dataset.column_names == rows.column_names
    trainer.train()


def test_defaults_of_the_two_loaders_agree():
    """FastModel repeats FastLanguageModel's signature; a default that drifts apart would be a surprise."""
    from dropforge import FastLanguageModel, FastModel

    one = inspect.signature(FastLanguageModel.from_pretrained).parameters
    other = inspect.signature(FastModel.from_pretrained).parameters
    apart = {name for name in one.keys() & other.keys() if one[name].default != other[name].default}
    assert apart == {"model_name", "max_seq_length"}
    assert one.keys() <= other.keys()
