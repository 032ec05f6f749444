"""What published checkpoints get wrong, each built on purpose: mended or named at load, with a line in the report."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from dropforge.errors import CommandError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip


def load(folder="builtin:tiny-llama", **arguments):
    from dropforge import FastLanguageModel

    return FastLanguageModel.from_pretrained(str(folder), load_in_16bit=True, max_seq_length=128, **arguments)


def repairs(model):
    from dropforge.fast.state import state_of

    return state_of(model).repairs


@pytest.fixture
def broken(checkpoint):
    """Makes a checkpoint whose tokenizer_config.json has other values, and maybe another template."""
    from transformers import LlamaConfig

    def make(*, template=None, change=None, **fields):
        folder = checkpoint("broken", LlamaConfig(**SMALL), change=change)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def test_pad_that_is_the_end_token(broken):
    """Masked like padding, the end token would never be learnt."""
    model, tokenizer = load(broken(pad_token="<|im_end|>"))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert any(line.startswith("pad token was the end token") for line in repairs(model))
    _, same = load(broken(pad_token="<|im_end|>"), fix_tokenizer=False)
    assert same.pad_token_id == same.eos_token_id


PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"


def test_template_without_an_end_token(broken):
    model, tokenizer = load(broken(template=PLAIN + "{% if add_generation_prompt %}assistant: {% endif %}"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "user: q\nassistant: a\n<|im_end|>"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "user: q\nassistant: "
    assert "the chat template ended answers with no token; now '<|im_end|>' stands after the last one" in repairs(model)


def test_template_without_a_generation_prompt(broken):
    model, _ = load(broken(template=PLAIN))
    assert any("no generation prompt" in line and "get_chat_template" in line for line in repairs(model))


def test_double_begin_token(broken):
    """Template and tokenizer both write it: said at load, and one of them is left out of training rows."""
    from dropforge.trainers import encode_text

    model, tokenizer = load()
    assert any(line.startswith("double begin token") for line in repairs(model))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    assert encode_text(text, tokenizer).count(tokenizer.bos_token_id) == 1


def test_generation_ends_where_turns_end(broken):
    """A base model's end token, and a chat template that ends turns with another."""
    model, tokenizer = load(broken(eos_token="</s>"))
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {tokenizer.eos_token_id, turn} <= set(model.generation_config.eos_token_id)
    assert any("generation did not end at" in line and "'<|im_end|>'" in line for line in repairs(model))


def untrained(model, tokenizer):
    """Zero rows, and rows that are one another's copies, in both tables."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[start] = 0
        table.weight[end] = table.weight[100]


def test_untrained_tokens_are_found_and_drawn_anew_on_request(broken, caplog):
    from datasets import Dataset
    from dropforge import FastLanguageModel, fix_untrained_tokens
    from dropforge.trainers import SFTConfig, SFTTrainer

    model, tokenizer = load(broken(change=untrained))
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    (line,) = [line for line in repairs(model) if "untrained" in line]
    # The pad row is zero too, as torch makes it.
    assert "the chat template writes '<|im_start|>', '<|im_end|>'" in line and "fix_untrained_tokens" in line
    model = FastLanguageModel.get_peft_model(model, r=2)
    arguments = {"output_dir": "x", "report_to": "none", "max_steps": 1}
    data = Dataset.from_dict({"text": ["<|im_start|>user\nq<|im_end|>"]})
    SFTTrainer(model, SFTConfig(**arguments), tokenizer=tokenizer, train_dataset=data)
    assert "the data uses 2 tokens with untrained embeddings" in caplog.text
    table = model.get_input_embeddings().weight
    before = table.clone()
    fixed = fix_untrained_tokens(model, tokenizer)
    assert {start, end, 100} <= set(fixed)
    kept = [index for index in range(len(tokenizer)) if index not in fixed]
    for weight in (table, model.get_output_embeddings().weight):
        spread, mean = torch.std_mean(weight[kept], dim=0)
        away = ((weight[fixed] - mean) / spread).pow(2).mean().sqrt()
        assert 0.7 < away < 1.3 and not torch.equal(weight[start], weight[end])
    assert torch.equal(table[kept], before[kept])
    assert fix_untrained_tokens(model, tokenizer) == [] and "drawn from the distribution" in repairs(model)[-1]


def test_drawn_rows_have_the_mean_and_the_covariance_of_the_learnt_ones():
    from dropforge.models.drawn_rows import drawn_rows

    torch.manual_seed(0)
    mixing = torch.randn(4, 4)
    learnt = torch.randn(20_000, 4) @ mixing + torch.tensor([1.0, -2.0, 3.0, 0.5])
    drawn = drawn_rows(learnt.bfloat16(), 3_000)
    assert torch.allclose(drawn.mean(dim=0), learnt.mean(dim=0), atol=0.15)
    assert torch.allclose(drawn.T.cov(), learnt.T.cov(), atol=0.15 * float(learnt.T.cov().abs().max()))
    assert torch.equal(drawn, drawn_rows(learnt.bfloat16(), 3_000))


def test_rows_that_differ_are_not_called_untrained():
    from dropforge.fast.repairs import untrained_rows

    weight = torch.randn(40_000, 8).bfloat16()
    weight[7] = weight[39_000]
    weight[20_000] = 0
    near = weight[12].clone()
    near[3] += 1
    weight[30_000] = near
    found = set(untrained_rows(weight).tolist())
    assert {7, 39_000, 20_000} <= found and not {12, 30_000} & found


@pytest.mark.parametrize(
    ("family", "bf16", "expected"),
    [("gemma3_text", True, torch.bfloat16), ("gemma2", False, torch.float32), ("llama", True, torch.float16)],
)
def test_families_that_overflow_in_fp16(family, bf16, expected):
    from dropforge.fast.repairs import compute_dtype

    dtype, line = compute_dtype(torch.float16, model_type=family, bf16=bf16)
    assert dtype is expected and (line is None) == (family == "llama")
    assert compute_dtype(torch.bfloat16, model_type=family, bf16=bf16) == (torch.bfloat16, None)


def test_a_gemma_in_fp16_is_loaded_in_another_type_and_trains_without_fp16(checkpoint):
    from dropforge.trainer_arguments import fit_to_model
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=64)
    model, _ = load(checkpoint("gemma", config), dtype="float16")
    expected = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert model.dtype is expected
    assert any(line.startswith("fp16 -> ") and "gemma3_text" in line for line in repairs(model))
    from dropforge.fast.state import state_of

    asked = SimpleNamespace(use_cpu=False, fp16=True, bf16=False, max_length=64, length_given=True)
    fitted = fit_to_model(asked, state_of(model))
    assert (fitted.fp16, fitted.bf16) == (False, expected is torch.bfloat16)


def test_fp16_asked_of_a_model_that_computes_in_bf16():
    from dropforge.fast.state import state_of
    from dropforge.trainer_arguments import fit_to_model

    model, _ = load(dtype="bfloat16")
    asked = SimpleNamespace(use_cpu=False, fp16=True, bf16=False)
    with pytest.raises(CommandError) as caught:
        fit_to_model(asked, state_of(model))
    assert (caught.value.code, caught.value.problems[0].where) == ("api-precision", "fp16")


def test_a_grown_vocabulary_is_reported():
    model, _ = load(resize_model_vocab=2000)
    assert model.get_input_embeddings().weight.shape[0] == 2000
    assert any("grew from 1536 to 2000 rows" in line for line in repairs(model))
    from dropforge import model_report

    assert f"repair: {repairs(model)[0]}" in model_report(model)
