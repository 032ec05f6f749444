"""Talking to a result: what was trained comes out of the exported files, word for word."""

from __future__ import annotations

import pytest
from dropforge.chat import answer, choose_gguf, converse
from dropforge.errors import CommandError
from export_harness import FACTS


def test_the_q8_0_file_answers_word_for_word(memorised):
    result, _ = memorised
    assert choose_gguf(result.path).name == "test-model-Q8_0.gguf"
    assert answer(result.path, list(FACTS), max_tokens=60) == list(FACTS.values())


def test_so_does_the_merged_folder(memorised):
    result, _ = memorised
    assert answer(result.merged, list(FACTS), max_tokens=60) == list(FACTS.values())


def test_the_number_of_tokens_is_a_limit(memorised):
    result, _ = memorised
    question, whole = next(iter(FACTS.items()))
    (short,) = answer(result.path, [question], max_tokens=4)
    assert whole.startswith(short) and 0 < len(short) < len(whole)


def test_the_system_message_is_part_of_the_conversation(memorised):
    from dropforge.llama_cpp.server import LlamaServer

    result, _ = memorised
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with LlamaServer(choose_gguf(result.path), context=512) as server:
        assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi" in server.apply_template(messages)
        whole = server.chat(messages, max_tokens=8)
    assert answer(result.path, ["Hi"], max_tokens=8, system="Be brief.") == [whole]


def test_a_conversation_remembers_until_it_is_cleared(memorised):
    result, _ = memorised
    question, whole = next(iter(FACTS.items()))
    lines = iter([question, "/clear", question, "/exit", "never read"])
    written: list[str] = []
    assert converse(result.path, max_tokens=60, read=lambda: next(lines), write=written.append) == 0
    assert written == [whole, whole]
    assert next(lines) == "never read"


def test_the_preferred_file_is_small_but_close(tmp_path):
    (tmp_path / "gguf").mkdir()
    assert choose_gguf(tmp_path) is None
    for name in ("a-TQ1_0", "a-F16", "a-Q4_K_M", "a-Q8_0"):
        (tmp_path / "gguf" / f"{name}.gguf").touch()
        assert choose_gguf(tmp_path).stem == name
    assert choose_gguf(tmp_path / "gguf" / "a-F16.gguf").stem == "a-F16"


def test_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(CommandError) as error:
        answer(tmp_path, ["Hello"])
    assert error.value.code == "chat-nothing"
    assert "gguf:q8_0" in error.value.problems[0].fix
