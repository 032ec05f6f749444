"""The repairs of the tokenizer: each fault is made, and must be gone in the exported folder and in the GGUF."""

from __future__ import annotations

import json

import pytest
from dropforge.errors import ExportError
from dropforge.export.chat_format import GUARD
from dropforge.export.probes import TEXTS
from dropforge.export.stage import Stage
from dropforge.export.tokenizer_files import is_sentencepiece, space_prefix, write_tokenizer
from dropforge.export.verify_gguf import verify_gguf
from export_harness import copy, edit_json


def definition(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def verified(bench, tools, folder, **changes):
    """Convert with another tokenizer folder and verify; returns the stage and the checks."""
    stage = Stage(bench.request(("merged",), work=folder / "work", **changes), log=bench.log.append)
    base = stage.base_gguf
    return stage, verify_gguf(base.path, gguf_type=base.gguf_type, expected=base.expected, tools=tools)


def test_kinds_are_told_apart(llama, qwen):
    assert is_sentencepiece(definition(llama.base))
    assert not is_sentencepiece(definition(qwen.base))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, "first"),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, "never"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]}}, "always"),
        ({"normalizer": {"type": "Replace"}, "pre_tokenizer": None}, "never"),
    ],
)
def test_space_prefix(section, expected):
    assert space_prefix(section) == expected


def test_sentencepiece_file_is_copied_when_it_fits(llama, tmp_path):
    repairs = write_tokenizer(llama.tokenizer, tmp_path, base=llama.base)
    assert (tmp_path / "tokenizer.model").read_bytes() == (llama.base / "tokenizer.model").read_bytes()
    assert repairs == ["tokenizer_config.json: added_tokens_decoder written"]


def test_sentencepiece_file_is_rebuilt_when_it_is_lost(llama, tmp_path):
    """transformers 5 saves no tokenizer.model; the rebuilt one has the same pieces, kinds and order of scores."""
    from sentencepiece import SentencePieceProcessor

    base = copy(llama.base, tmp_path / "base")
    (base / "tokenizer.model").unlink()
    (tmp_path / "out").mkdir()
    repairs = write_tokenizer(llama.tokenizer, tmp_path / "out", base=base)
    assert "tokenizer.model rebuilt from tokenizer.json" in repairs
    rebuilt, original = SentencePieceProcessor(), SentencePieceProcessor()
    rebuilt.LoadFromFile(str(tmp_path / "out" / "tokenizer.model"))
    original.LoadFromFile(str(llama.base / "tokenizer.model"))
    assert rebuilt.GetPieceSize() == original.GetPieceSize()
    for text in TEXTS:
        assert rebuilt.EncodeAsIds(text) == original.EncodeAsIds(text)


def test_a_sentencepiece_file_of_another_vocabulary_is_not_used(llama, tmp_path):
    base = copy(llama.base, tmp_path / "base")
    vocabulary = definition(llama.base)
    pieces = list(vocabulary["model"]["vocab"])
    first, second = pieces[-2], pieces[-1]
    vocab = vocabulary["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tokenizer = copy(llama.tokenizer, tmp_path / "tokenizer")
    (tokenizer / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "out").mkdir()
    assert "tokenizer.model rebuilt from tokenizer.json" in write_tokenizer(tokenizer, tmp_path / "out", base=base)


def test_paths_of_this_machine_are_removed(llama, tmp_path):
    tokenizer = copy(llama.tokenizer, tmp_path / "tokenizer")
    edit_json(tokenizer / "tokenizer_config.json", name_or_path="/home/me/model", vocab_file="/home/me/tokenizer.model")
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", base=llama.base)
    assert "/home/me" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_a_folder_without_tokenizer_json_is_refused(llama, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError) as error:
        write_tokenizer(tmp_path / "empty", tmp_path, base=llama.base)
    assert error.value.code == "export-tokenizer"


@pytest.mark.parametrize(("scheme", "plain"), [("first", False), pytest.param("always", True, marks=pytest.mark.slow)])
def test_a_vocabulary_with_a_space_prefix(llama, llama_cpp, tmp_path, scheme, plain):
    """Chats come out alike with either prefix; plain texts only where llama.cpp has the same rule."""
    tokenizer = copy(llama.tokenizer, tmp_path / "tokenizer")
    changed = definition(tokenizer)
    changed["pre_tokenizer"]["prepend_scheme"] = scheme
    (tokenizer / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    edit_json(tokenizer / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _, checks = verified(llama, llama_cpp, tmp_path, tokenizer=tokenizer)
    assert checks["conversations_equal"] == 7
    assert (checks["texts_equal"] > 40) is plain


def test_a_template_without_bos_on_a_vocabulary_that_adds_one(llama, llama_cpp, tmp_path):
    """The training saw no BOS, so the GGUF must not add one. Its tokenizer.model is lost too, and comes out right."""
    base = copy(llama.base, tmp_path / "base")
    (base / "tokenizer.model").unlink()
    tokenizer = copy(llama.tokenizer, tmp_path / "tokenizer")
    text = (tokenizer / "chat_template.jinja").read_text().replace("{{ bos_token }}", "")
    (tokenizer / "chat_template.jinja").write_text(text)
    stage, checks = verified(llama, llama_cpp, tmp_path, tokenizer=tokenizer, base_path=base)
    assert "tokenizer.model rebuilt from tokenizer.json" in stage.merged.checks["repairs"]
    assert checks["conversations_equal"] == 7
    assert checks["texts_equal"] > 50
    assert stage.ollama_template.text is not None


def test_wrong_end_token_and_a_template_ollama_cannot_write(qwen, llama_cpp, tmp_path):
    """Base models name their document end: the GGUF must stop at the turn's end. And Ollama must not guess a template."""
    tokenizer = copy(qwen.tokenizer, tmp_path / "tokenizer")
    edit_json(tokenizer / "tokenizer_config.json", eos_token="<|endoftext|>")
    text = (tokenizer / "chat_template.jinja").read_text().replace("message['content']", "message['content']|trim")
    (tokenizer / "chat_template.jinja").write_text(text)
    stage, checks = verified(qwen, llama_cpp, tmp_path, tokenizer=tokenizer)
    assert stage.end_token == "<|im_end|>"
    assert stage.stops == ["<|im_end|>", "<|endoftext|>"]
    generation = json.loads((stage.merged.folder / "generation_config.json").read_text())
    ids = generation["eos_token_id"] if isinstance(generation["eos_token_id"], list) else [generation["eos_token_id"]]
    assert stage.tokenizer.convert_tokens_to_ids("<|im_end|>") in ids
    assert stage.ollama_template.text is None
    assert stage.base_gguf.expected.template == text + GUARD
    assert checks["conversations_equal"] == 7
