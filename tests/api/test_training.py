"""Training through our trainers: any split of a batch is the same step, runs go on where they stopped, rates of their own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from dropforge.errors import CommandError

ARGUMENTS = {"output_dir": "outputs", "report_to": "none", "save_strategy": "no", "logging_steps": 1, "seed": 11,
             "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}  # fmt: skip
# Between 2 and 40 words, so that the micro-batches of a step hold very different numbers of tokens.
TEXTS = [f"{number} " + "tale of a cat and a dog " * (number % 7) + "end." for number in range(24)]


def load(**arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.from_pretrained("builtin:tiny-llama", load_in_16bit=True, max_seq_length=128, **arguments)


def prepared(targets=("q_proj", "down_proj"), **arguments):
    from dropforge import FastLanguageModel

    model, tokenizer = load(**arguments)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=list(targets), use_gradient_checkpointing=False)
    return model, tokenizer


def trainer_of(model, tokenizer, *, kind="SFTTrainer", texts=TEXTS, **arguments):
    from datasets import Dataset
    from dropforge import trainers

    config = trainers.SFTConfig(**{**ARGUMENTS, **arguments})
    return getattr(trainers, kind)(
        model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": list(texts)}), args=config
    )


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def large_batch(tmp_path_factory):
    """(weights, losses) after two steps of 12 rows at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DROPFORGE_DATA", str(tmp_path_factory.mktemp("data")))
        patch.chdir(tmp_path_factory.mktemp("run"))
        model, tokenizer = prepared()
        trainer = trainer_of(model, tokenizer, per_device_train_batch_size=12, max_steps=2, optim="sgd")
        trainer.train()
        return weights_of(model), losses_of(trainer)


@pytest.mark.parametrize(
    ("micro", "steps", "kernels"),
    [(1, 12, "off"), (1, 12, "required"), (3, 4, "off"), (4, 3, "required"), (5, 3, "off"), (5, 3, "required")],
)
def test_any_split_of_a_batch_is_the_same_step(large_batch, micro, steps, kernels):
    """Plain gradient descent, so that a wrong scale of the gradient shows; 5 x 3 rows must differ from 12."""
    model, tokenizer = prepared(kernels=kernels)
    trainer = trainer_of(
        model, tokenizer, per_device_train_batch_size=micro, gradient_accumulation_steps=steps, max_steps=2, optim="sgd"
    )
    trainer.train()
    weights, losses = large_batch
    same = all(torch.allclose(p, weights[name], atol=2e-6, rtol=1e-5) for name, p in weights_of(model).items())
    close = losses_of(trainer) == pytest.approx(losses, rel=1e-5)
    assert (same, close) == ((True, True) if micro * steps == 12 else (False, False))


def test_the_loss_is_per_counted_token(large_batch):
    """The logged loss is the mean over the targets of the whole step, not a mean of means."""
    model, tokenizer = prepared()
    trainer = trainer_of(model, tokenizer, per_device_train_batch_size=12, max_steps=1, optim="sgd")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    counted = (batch["labels"][:, 1:] != -100).sum()
    assert large_batch[1][0] == pytest.approx((nll.sum() / counted).item(), rel=1e-5)


@pytest.mark.parametrize("fast_step", [False, True])
def test_embeddings_learn_at_their_own_rate(fast_step):
    """One step of sign-like Adam moves each weight by about its group's rate; the fast step's optimizer does too."""
    from dropforge import DropforgeTrainer, DropforgeTrainingArguments
    from dropforge.trainers import FastOptions, SFTTrainer

    assert issubclass(DropforgeTrainer, SFTTrainer)
    model, tokenizer = prepared(["q_proj", "lm_head", "embed_tokens"])
    before = weights_of(model)
    from datasets import Dataset

    trainer = DropforgeTrainer(
        model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"text": TEXTS}),
        fast=FastOptions() if fast_step else False,
        args=DropforgeTrainingArguments(
            **{**ARGUMENTS, "learning_rate": 1e-2}, embedding_learning_rate=1e-3, max_steps=1, optim="adamw_torch",
            per_device_train_batch_size=4, weight_decay=0.0,
        ),
    )  # fmt: skip
    trainer.train()
    moved = {name: (p - before[name]).abs().max().item() for name, p in weights_of(model).items()}
    slow = {name: value for name, value in moved.items() if "modules_to_save" in name}
    fast = {name: value for name, value in moved.items() if "lora_B" in name}
    assert (trainer.fast is not None) is fast_step
    assert len(slow) == 2 and all(value == pytest.approx(1e-3, rel=0.02) for value in slow.values())
    assert fast and all(value == pytest.approx(1e-2, rel=0.02) for value in fast.values())
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == [1e-3, 1e-2]


def test_an_embedding_rate_with_nothing_to_train():
    model, tokenizer = prepared()
    trainer = trainer_of(model, tokenizer, embedding_learning_rate=1e-5, max_steps=1)
    with pytest.raises(CommandError) as caught:
        trainer.train()
    assert (caught.value.code, caught.value.problems[0].where) == ("api-embedding-rate", "embedding_learning_rate")


def test_groups_keep_biases_and_norms_from_decaying():
    from types import SimpleNamespace

    from dropforge.parameter_groups import parameter_groups

    model, _ = load()
    model.requires_grad_(True)
    train = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, embedding_learning_rate=1e-3)
    groups = parameter_groups(model, train)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {(group["lr"], group["weight_decay"]): [names[id(p)] for p in group["params"]] for group in groups}
    assert sum(map(len, found.values())) == len(names)
    assert found[1e-3, 0.1] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all("norm" in name for name in found[1e-2, 0.0]) and len(found[1e-2, 0.0]) == 5


def run(model, tokenizer, *, resume=None, texts=TEXTS, **arguments):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2,
                "lr_scheduler_type": "linear", "optim": "adamw_torch"}  # fmt: skip
    trainer = trainer_of(model, tokenizer, texts=texts, **{**settings, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(tmp_path):
    """Adapter, embeddings in fp32, optimizer, schedule and data order: the same weights after four steps."""
    targets = ["q_proj", "embed_tokens", "lm_head"]
    straight, tokenizer = prepared(targets, dtype="bfloat16")
    run(straight, tokenizer, embedding_learning_rate=1e-3)
    record = json.loads((tmp_path / "outputs" / "checkpoint-2" / "dropforge_run.json").read_text())
    assert record["rows"] == 24 and record["model"] == "builtin:tiny-llama"
    resumed, tokenizer = prepared(targets, dtype="bfloat16")
    trainer = run(resumed, tokenizer, resume="outputs/checkpoint-2", embedding_learning_rate=1e-3)
    assert trainer.state.global_step == 4
    ours, theirs = weights_of(resumed), weights_of(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, _ = load_adapter(tmp_path / "outputs" / "checkpoint-4")
    assert all(torch.equal(p, theirs[name]) for name, p in weights_of(again).items())


def load_adapter(folder):
    from dropforge import FastLanguageModel

    return FastLanguageModel.from_pretrained(str(folder), load_in_16bit=True, dtype="bfloat16")


def test_another_run_does_not_go_on_from_a_checkpoint():
    model, tokenizer = prepared()
    run(model, tokenizer, max_steps=2)
    other, _ = prepared(["k_proj", "down_proj"])
    for given, arguments, where in (
        (other, {}, "get_peft_model"),
        (model, {"texts": TEXTS[1:]}, "train_dataset"),
        (model, {"texts": [*TEXTS[:3], "another text", *TEXTS[4:]]}, "train_dataset"),
        (model, {"optim": "sgd"}, "optim"),
    ):
        with pytest.raises(CommandError) as caught:
            run(given, tokenizer, resume=True, **arguments)
        problem = caught.value.problems[0]
        assert problem.code == "api-other-run" and where in problem.where
        assert "resume_from_checkpoint" in problem.where and problem.fix
    for asked in (True, "outputs/checkpoint-9"):
        with pytest.raises(CommandError) as caught:
            run(model, tokenizer, resume=asked, output_dir="elsewhere")
        assert (caught.value.code, caught.value.problems[0].where) == ("api-no-checkpoint", "resume_from_checkpoint")


def test_a_plain_script_ports_by_its_import_lines():
    """transformers and PEFT load, TRL's arguments: dropforge.trainers in place of trl, and the same losses."""
    import trl
    from datasets import Dataset
    from dropforge import trainers
    from dropforge.models.source import resolve_model
    from dropforge.paths import DataRoot
    from dropforge.settings import settings
    from dropforge.spec import ModelSpec
    from peft import LoraConfig

    folder = resolve_model(ModelSpec(id="builtin:tiny-llama"), root=DataRoot(settings().data_root)).path
    losses = []
    for SFTConfig, SFTTrainer in ((trl.SFTConfig, trl.SFTTrainer), (trainers.SFTConfig, trainers.SFTTrainer)):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer(text)["input_ids"] for text in TEXTS]
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": texts, "labels": texts}),
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
            args=SFTConfig(
                **ARGUMENTS, max_steps=3, max_length=64, use_cpu=True, bf16=False, gradient_checkpointing=False
            ),
        )
        if SFTTrainer is trl.SFTTrainer:
            # TRL's fused head is a Triton kernel; its value on a CPU is the model's own loss.
            import transformers

            trainer.compute_loss = lambda model, inputs, trainer=trainer, **others: transformers.Trainer.compute_loss(
                trainer, model, inputs, **others
            )
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and all(map(math.isfinite, losses[0]))


def test_fp16_asked_of_a_machine_without_a_gpu(caplog):
    """`fp16 = not is_bfloat16_supported()` stands in most scripts."""
    from dropforge import is_bfloat16_supported
    from dropforge.trainers import SFTConfig, TrainingArguments

    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    for kind in (SFTConfig, TrainingArguments):
        config = kind(output_dir="x", fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported())
        assert (config.fp16, config.bf16, config.use_cpu) == (False, False, True)
    assert "training runs in fp32" in caplog.text


def test_transformers_own_trainer():
    """As in scripts that prepare rows themselves."""
    from datasets import Dataset
    from dropforge.trainers import Trainer, TrainingArguments
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer = prepared()
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    trainer = Trainer(
        model=model, tokenizer=tokenizer, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(output_dir="outputs", max_steps=3, warmup_ratio=0.1, logging_steps=1, report_to="none",
                               learning_rate=1e-2, per_device_train_batch_size=8),
    )  # fmt: skip
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] and trainer.args.gradient_checkpointing is False
