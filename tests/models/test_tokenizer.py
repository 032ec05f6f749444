"""Templates chosen and tokens repaired, with a reason for each."""

from __future__ import annotations

import json

import pytest
from dropforge.errors import DataError, ModelError
from dropforge.models.builtin import build_builtin
from dropforge.models.templates import TEMPLATES
from dropforge.models.tokenizer import NEW_PAD, load_tokenizer
from transformers import AutoTokenizer

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}]


@pytest.fixture
def llama(tmp_path):
    build_builtin("tiny-llama", tmp_path)
    return tmp_path


@pytest.fixture
def qwen(tmp_path):
    build_builtin("tiny-qwen3", tmp_path)
    return tmp_path


def change(folder, *, without_template=True, **fields):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    if without_template:
        (folder / "chat_template.jinja").unlink()


def test_the_models_own_template_is_kept(llama):
    tokenizer, choice = load_tokenizer(llama)
    assert (choice.name, choice.repairs, choice.added_tokens) == ("model", (), ())
    assert tokenizer.chat_template == TEMPLATES["chatml-bos"].text


def test_no_template_means_chatml_with_the_begin_token_the_model_expects(llama):
    change(llama)
    tokenizer, choice = load_tokenizer(llama)
    assert choice.name == "chatml" and "brings no chat template" in choice.reason
    assert tokenizer.chat_template == TEMPLATES["chatml-bos"].text


def test_no_template_and_no_begin_token(qwen):
    change(qwen)
    assert load_tokenizer(qwen)[0].chat_template == TEMPLATES["chatml"].text


def test_a_named_template(qwen):
    tokenizer, choice = load_tokenizer(qwen, template="chatml")
    assert (choice.name, choice.reason) == ("chatml", "named in data.template")


def test_an_unknown_template_names_the_nearest(qwen):
    with pytest.raises(DataError) as caught:
        load_tokenizer(qwen, template="chatlm")
    assert caught.value.code == "template-unknown"
    assert "did you mean chatml?" in caught.value.problems[0].fix


def test_the_end_token_becomes_the_one_that_ends_turns(llama):
    change(llama, eos_token="</s>")
    tokenizer, choice = load_tokenizer(llama)
    assert tokenizer.eos_token == "<|im_end|>"
    assert any("'</s>' -> '<|im_end|>'" in repair for repair in choice.repairs)


def test_a_vocabulary_without_the_markers_ends_turns_with_its_own_end_token(llama):
    text = (
        (llama / "tokenizer.json")
        .read_text()
        .replace("<|im_start|>", "<|other_1|>")
        .replace("<|im_end|>", "<|other_2|>")
    )
    (llama / "tokenizer.json").write_text(text)
    change(llama, eos_token="</s>", extra_special_tokens=["<|other_1|>", "<|other_2|>"])
    size = len(AutoTokenizer.from_pretrained(llama))
    tokenizer, choice = load_tokenizer(llama)
    assert len(tokenizer) == size and not choice.added_tokens
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).endswith("assistant\ngood morning</s>\n")
    assert any("not in the vocabulary" in repair for repair in choice.repairs)


@pytest.mark.parametrize("pad", ("<|im_end|>", None))
def test_a_missing_pad_or_one_that_is_the_end_token_is_replaced(llama, pad):
    change(llama, without_template=False, pad_token=pad)
    tokenizer, choice = load_tokenizer(llama)
    assert tokenizer.pad_token == "<pad>"
    assert len(choice.repairs) == 1 and "'<pad>' of the vocabulary" in choice.repairs[0]
    assert not choice.added_tokens


def test_a_pad_is_added_when_the_vocabulary_has_none_to_spare(qwen):
    text = (qwen / "tokenizer.json").read_text().replace("<|endoftext|>", "<|not_spare|>")
    (qwen / "tokenizer.json").write_text(text)
    change(qwen, without_template=False, pad_token="<|im_end|>")
    tokenizer, choice = load_tokenizer(qwen)
    assert choice.added_tokens == (NEW_PAD,)
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(NEW_PAD) != tokenizer.eos_token_id


def test_an_unreadable_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "tokenizer-unreadable"
