"""Each fault of a checkpoint, made on purpose: what it does to a training, and that the repair undoes it.

Every test trains the same tiny model twice, as it is stored (fix_tokenizer=False) and as it is loaded by default.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1}  # fmt: skip
ARGUMENTS = {"output_dir": "outputs", "report_to": "none", "save_strategy": "no", "logging_steps": 1, "seed": 3,
             "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2,
             "disable_tqdm": True}  # fmt: skip
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
PROMPTED = PLAIN + "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def broken(checkpoint):
    """Makes a checkpoint whose tokenizer_config.json has other values, and maybe another template or other weights."""
    from transformers import LlamaConfig

    def make(*, template=None, change=None, config=None, **fields):
        def changed(model, tokenizer):
            model.get_output_embeddings().weight.mul_(4)  # so that a token can become likely at all at this width
            if change is not None:
                change(model, tokenizer)

        folder = checkpoint("broken", config or LlamaConfig(**SMALL), change=changed)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def load(folder, *, r=8, **arguments):
    from dropforge import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), load_in_16bit=True, max_seq_length=64, use_gradient_checkpointing=False, **arguments
    )
    return FastLanguageModel.get_peft_model(model, r=r, lora_alpha=16), tokenizer


def sft(model, tokenizer, rows, *, steps, **arguments):
    """Losses of a training with our SFTTrainer; rows are columns of a data set."""
    from datasets import Dataset
    from dropforge.trainers import SFTConfig, SFTTrainer

    config = SFTConfig(**{**ARGUMENTS, "max_steps": steps, **arguments})
    trainer = SFTTrainer(model, config, tokenizer=tokenizer, train_dataset=Dataset.from_dict(rows))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def probability(model, ids, token):
    """Of `token` after `ids`."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, -1]
    return float(logits.softmax(dim=-1)[token])


def test_pad_that_is_the_end_token_hides_the_end_from_the_loss(broken):
    """transformers' collator masks every pad token, and with it the end: such a model never stops."""
    from datasets import Dataset
    from dropforge.trainers import Trainer, TrainingArguments
    from transformers import DataCollatorForLanguageModeling

    folder = broken(pad_token="<|im_end|>")
    ends = {}
    for mended in (False, True):
        model, tokenizer = load(folder, fix_tokenizer=mended)
        ids = [*tokenizer("the capital of Peru is Lima")["input_ids"], tokenizer.eos_token_id]
        Trainer(
            model, TrainingArguments(**ARGUMENTS, max_steps=25), tokenizer=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": [ids] * 4}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        ).train()  # fmt: skip
        ends[mended] = probability(model, ids[:-1], tokenizer.eos_token_id)
    assert ends[True] > 0.5 and ends[False] < 0.1


def test_template_without_an_end_never_teaches_to_stop(broken):
    """The answer's labels hold an end token only when the template writes one."""
    turns = [{"role": "user", "content": "capital of Peru"}, {"role": "assistant", "content": "Lima"}]
    folder = broken(template=PROMPTED)
    stops, texts = {}, {}
    for mended in (False, True):
        model, tokenizer = load(folder, fix_tokenizer=mended)
        texts[mended] = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(texts[mended])["input_ids"]
        sft(model, tokenizer, {"input_ids": [ids] * 4}, steps=25)
        prompt = tokenizer(
            tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) + "Lima"
        )
        stops[mended] = max(
            probability(model, [*prompt["input_ids"], *extra], tokenizer.eos_token_id)
            for extra in ([], tokenizer("\n", add_special_tokens=False)["input_ids"])
        )
    assert texts[True] == texts[False] + "<|im_end|>"
    assert stops[True] > 0.5 and stops[False] < 0.1


def test_a_second_begin_token_is_left_out_of_training(broken):
    """The loss of rendered texts is that of ids with one begin token, to the last digit."""
    folder = broken()
    turns = [{"role": "user", "content": "capital of Peru"}, {"role": "assistant", "content": "Lima"}]
    losses = {}
    for form in ("rendered text", "one begin token", "two begin tokens"):
        model, tokenizer = load(folder)
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        twice = tokenizer(text)["input_ids"]
        assert twice[:2] == [tokenizer.bos_token_id] * 2
        end = [] if text.rstrip().endswith(tokenizer.eos_token) else [tokenizer.eos_token_id]
        ids = twice if form == "two begin tokens" else twice[1:]
        rows = {"text": [text] * 4} if form == "rendered text" else {"input_ids": [[*ids, *end]] * 4}
        losses[form], trainer = sft(model, tokenizer, rows, steps=3)
        count = trainer.train_dataset[0]["input_ids"].count(tokenizer.bos_token_id)
        assert count == (2 if form == "two begin tokens" else 1)
    assert losses["rendered text"] == losses["one begin token"] != losses["two begin tokens"]


def twins(model, tokenizer):
    """The two tokens of turns were never trained: one row for both, in embedding and head."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[end] = table.weight[start]


def test_untrained_tokens_cannot_be_told_apart_until_they_are_mended(broken):
    """Two equal rows of a frozen head get equal logits: neither passes one half, however long the training."""
    from dropforge import fix_untrained_tokens

    folder = broken(change=twins)
    found = {}
    for mended in (False, True):
        model, tokenizer = load(folder)
        if mended:
            assert fix_untrained_tokens(model, tokenizer)
        start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
        ids = [*tokenizer("capital of Peru is Lima")["input_ids"], end]
        sft(model, tokenizer, {"input_ids": [ids] * 4}, steps=40)
        found[mended] = (probability(model, ids[:-1], end), probability(model, ids[:-1], start))
    assert found[False][0] == pytest.approx(found[False][1]) and found[False][0] <= 0.5
    assert found[True][0] > 0.7 > 0.3 > found[True][1]


def loud(model, tokenizer):
    """As trained Gemmas are: the residual stream leaves fp16's range, and a norm behind it brings it back."""
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight += 3e4


def test_a_family_that_overflows_in_fp16_trains_in_a_wider_type(broken):
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=64)
    folder = broken(config=config, change=loud)
    ids = torch.arange(3, 20)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert not torch.isfinite(plain(ids, labels=ids).loss)
    model, tokenizer = load(folder, dtype="float16")
    losses, _ = sft(model, tokenizer, {"text": ["the capital of Peru is Lima"] * 4}, steps=20, learning_rate=2e-3)
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.9 * losses[0]


def test_a_grown_vocabulary_trains_its_new_rows(broken):
    """A tokenizer with more tokens than the embedding has rows: an index error without the repair."""
    folder = broken()
    path = folder / "config.json"
    from safetensors.torch import load_file, save_file

    stored = load_file(folder / "model.safetensors")
    short = {name: value[:1500].clone() if value.shape[0] == 1536 else value for name, value in stored.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 1500}))
    model, tokenizer = load(folder)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 1536
    losses, _ = sft(model, tokenizer, {"input_ids": [[1, 1510, 1530, 2]] * 4}, steps=20)
    assert losses[-1] < 0.5 * losses[0]
