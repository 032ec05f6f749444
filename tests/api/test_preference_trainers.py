"""TRL's preference trainers with older names and places of arguments, on a model of ours: they train, and refuse typos."""

from __future__ import annotations

import math

import pytest
from dropforge.errors import CommandError

PAIRS = {
    "prompt": ["Capital of Peru?", "Capital of Italy?", "Two plus two?", "Colour of snow?"],
    "chosen": [" Lima.", " Rome.", " Four.", " White."],
    "rejected": [" Oslo, I think.", " Paris.", " Five.", " Black, mostly."],
}
ARGUMENTS = {"output_dir": "outputs", "report_to": "none", "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
             "warmup_ratio": 0.1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "seed": 5}  # fmt: skip


def prepared():
    from dropforge import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny-llama", 256, load_in_16bit=True)
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


def dataset(kind):
    from datasets import Dataset

    if kind != "KTO":
        return Dataset.from_dict(PAIRS)
    rows = [(p, c, True) for p, c in zip(PAIRS["prompt"], PAIRS["chosen"], strict=True)]
    rows += [(p, c, False) for p, c in zip(PAIRS["prompt"], PAIRS["rejected"], strict=True)]
    return Dataset.from_list([{"prompt": p, "completion": c, "label": label} for p, c, label in rows])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "place"),
    [("DPO", "trainer"), ("DPO", "config"), ("KTO", "trainer"), ("ORPO", "trainer"), ("CPO", "config")],
)
def test_older_scripts_train(kind, place):
    """As scripts of 2024 wrote them: TrainingArguments with beta and lengths given to the trainer; or all in the config."""
    from dropforge import PatchDPOTrainer, trainers

    PatchDPOTrainer()
    model, tokenizer = prepared()
    fields = {"beta": 0.2, "max_length": 128, "max_prompt_length": 64}
    if place == "trainer":
        args, given = trainers.TrainingArguments(**ARGUMENTS), fields
    else:
        args, given = getattr(trainers, f"{kind}Config")(**ARGUMENTS, **fields), {}
    if kind in ("DPO", "KTO"):
        given["ref_model"] = None
    trainer = getattr(trainers, f"{kind}Trainer")(
        model=model, args=args, tokenizer=tokenizer, train_dataset=dataset(kind), **given
    )
    assert (trainer.args.beta, trainer.args.max_length, trainer.args.max_steps) == (0.2, 128, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert any((p != before[name]).any() for name, p in model.named_parameters() if name in before)


def test_typos_and_contradictions():
    from dropforge.trainers import DPOConfig, DPOTrainer

    model, tokenizer = prepared()
    with pytest.raises(CommandError) as caught:
        DPOTrainer(model, args=DPOConfig(output_dir="x"), tokenizer=tokenizer, train_dataset=dataset("DPO"), betta=1)
    assert caught.value.problems[0].fix == "did you mean 'beta'?"
    with pytest.raises(CommandError, match="contradict"):
        DPOTrainer(
            model, args=DPOConfig(output_dir="x", beta=0.3), tokenizer=tokenizer, train_dataset=dataset("DPO"), beta=0.2
        )
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        import dropforge.trainers

        dropforge.trainers.PPOTrainer  # noqa: B018


def test_the_plain_head_gives_what_the_model_computes():
    """TRL's contract: log-probabilities at counted positions, zero elsewhere, and the mean loss."""
    import torch
    from dropforge.plain_head import add_plain_head
    from trl.trainer.utils import add_fused_lm_head

    model, _ = prepared()
    base = model.get_base_model()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 10, -100, -100]])
    expected = model(input_ids=ids, labels=labels).loss
    logits = model(input_ids=ids).logits
    add_fused_lm_head(base)
    add_plain_head(base)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (out.log_probs != 0).tolist() == [[False, True, True], [True, False, False]] == out.label_mask.tolist()
    assert out.log_probs[0, 1].item() == pytest.approx(logits[0, 1].log_softmax(-1)[7].item(), rel=1e-5)
    entropy = torch.distributions.Categorical(logits=logits[1, 0]).entropy()
    assert out.entropy[1, 0].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert model(input_ids=ids, labels=ids, fused_lm_head=True, num_items_in_batch=2).loss > out.loss
    assert torch.equal(model(input_ids=ids).logits, logits)
