"""The builtin models: sizes that llama.cpp likes, tokenizers that agree with SentencePiece, and the same bytes each time."""

from __future__ import annotations

import json
import random

import pytest
import sentencepiece
import torch
from dropforge.models.builtin import BUILTIN, build_builtin, recipe_hash
from dropforge.models.builtin_tokenizers import QWEN2_SPLIT, corpus
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = sorted(BUILTIN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name)
        build_builtin(name, made[name])
    return made


@pytest.fixture(params=NAMES)
def folder(request, folders):
    return folders[request.param]


def test_it_loads_and_every_weight_is_there(folder, recwarn):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert 1_900_000 < model.num_parameters() < 5_000_000
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    logits = model(torch.tensor([tokenizer("What is the symbol of iron?")["input_ids"]])).logits
    assert torch.isfinite(logits).all()


def test_rows_are_multiples_of_256(folder):
    """llama.cpp's k-quants fall back to other types otherwise."""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert matrices and all(shape[1] % 256 == 0 for shape in matrices.values())
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert ("lm_head.weight" in shapes) != tied


def test_building_again_gives_the_same_bytes_and_leaves_the_random_state_alone(folders, tmp_path):
    for name in NAMES:
        again = tmp_path / name
        again.mkdir()
        state = torch.random.get_rng_state()
        build_builtin(name, again)
        assert torch.equal(state, torch.random.get_rng_state())
        files = sorted(path.name for path in again.iterdir())
        assert files == sorted(path.name for path in folders[name].iterdir())
        for file in files:
            assert (again / file).read_bytes() == (folders[name] / file).read_bytes(), file


def test_hashes_differ_by_model():
    assert len({recipe_hash(name) for name in NAMES}) == len(NAMES)


def test_pad_end_and_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    for marker in ("<|im_start|>", "<|im_end|>", tokenizer.pad_token):
        assert tokenizer.tokenize(marker) == [marker]
    assert tokenizer.padding_side == "right"
    assert (folder / "chat_template.jinja").is_file()


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is  the symbol of Neon?\n"},
    {"role": "assistant", "content": "Ne — 水"},
]


def test_chat_text_round_trip(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token or ""
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == bos + "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in CHAT)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode(ids) == text
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n")
    # The begin token appears once, whether the template or the tokenizer writes it.
    assert tokenizer(text.removeprefix(bos))["input_ids"] == ids


def texts(count):
    generator = random.Random(11)
    source = corpus()
    for index in range(count):
        start = generator.randrange(len(source))
        kinds = (
            source[start : start + generator.randrange(1, 200)],
            "".join(generator.choice("aeosnt  \n\t") for _ in range(generator.randrange(1, 60))),
            "".join(chr(generator.choice((generator.randrange(32, 127), generator.randrange(160, 0x2580)))) for _ in range(30)),
            "".join(chr(generator.randrange(0x1F300, 0x1F6FF)) + " " for _ in range(5)) + "  x",
        )  # fmt: skip
        yield kinds[index % 4]


def test_sentencepiece_file_cuts_texts_like_tokenizer_json(folders):
    folder = folders["tiny-llama"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert library.vocab_size() == len(tokenizer)
    assert [library.id_to_piece(i) for i in range(len(tokenizer))] == tokenizer.convert_ids_to_tokens(
        range(len(tokenizer))
    )
    assert all(library.is_control(i) for i in range(1, 6)) and library.is_unknown(0) and library.is_byte(6)
    assert (library.bos_id(), library.eos_id(), library.pad_id()) == (1, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for text in texts(2000):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == library.encode(text), repr(text)
        assert tokenizer.decode(ids) == text
    json_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert json_config["add_prefix_space"] is False  # read by llama.cpp's converter


def test_qwen_pre_tokenizer_is_qwen2s(folders):
    """llama.cpp recognises it by this definition."""
    definition = json.loads((folders["tiny-qwen3"] / "tokenizer.json").read_text())
    assert definition["normalizer"] == {"type": "NFC"}
    splits = definition["pre_tokenizer"]["pretokenizers"]
    assert [part["type"] for part in splits] == ["Split", "ByteLevel"]
    assert splits[0]["pattern"] == {"Regex": QWEN2_SPLIT} and splits[0]["behavior"] == "Isolated"
    assert splits[1]["use_regex"] is False and splits[1]["add_prefix_space"] is False


def test_digits_are_single_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [piece.lstrip("▁Ġ") for piece in tokenizer.tokenize("103")] == ["1", "0", "3"]
