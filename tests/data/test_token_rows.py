"""Tokens by their bytes against the tokenizer's own offsets: the same labels, for any text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from dropforge.data.render import Renderer
from dropforge.data.token_bytes import TokenBytes, is_byte_level
from dropforge.data.token_rows import FEW, RowTokenizer
from dropforge.data.tokenize import tokenize_conversations
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

SIGNS = "ab cd\n  .,é水😀\u0301\t<|>{}[]'\"0123▁\u212b\u0958"
PLAIN = "the river is long, and cold. 12 houses\n é水😀"


def conversations(signs, count, seed=5):
    generator = random.Random(seed)

    def text():
        return "".join(generator.choices(signs, k=generator.randrange(1, 40)))

    for _ in range(count):
        turns = []
        for _ in range(generator.randrange(1, 4)):
            turns += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        yield turns


def rendered(tokenizer, signs, count=300):
    renderer = Renderer(tokenizer)
    return [renderer.render(turns, where="test:1") for turns in conversations(signs, count)]


def same(rows, reference):
    assert rows.ids.tolist() == [token for row in reference for token in row.input_ids]
    assert rows.labels.tolist() == [label for row in reference for label in row.labels]
    assert rows.ends.tolist() == np.cumsum([len(row.input_ids) for row in reference]).tolist()


@pytest.mark.parametrize("signs", [SIGNS, PLAIN], ids=["nasty", "plain"])
@pytest.mark.parametrize("everything", [False, True])
def test_labels_are_those_by_offsets(tokenizer, signs, everything):
    items = rendered(tokenizer, signs)
    reference = tokenize_conversations(tokenizer, items, everything=everything, length=2048)
    same(RowTokenizer(tokenizer).rows(items, everything=everything, length=2048), reference)


def test_both_ways_are_walked(tokenizer):
    """Plain texts are found by bytes; of the nasty ones some must be handed to the offsets, some not."""
    known = TokenBytes(tokenizer.backend_tokenizer)

    def found(signs):
        items = rendered(tokenizer, signs)
        rows = tokenize_conversations(tokenizer, items)
        return [known.writes(row.input_ids, item.text.encode()) for row, item in zip(rows, items, strict=True)]

    assert all(found(PLAIN))
    assert 0 < sum(found(SIGNS)) < 300


def test_long_rows_and_no_rows(tokenizer):
    rows = RowTokenizer(tokenizer)
    assert len(rows.rows([], length=64).ids) == 0
    items = [
        Renderer(tokenizer).render(
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 2000}], where="test:1"
        )
    ]
    same(rows.rows(items, length=16), tokenize_conversations(tokenizer, items, length=16))


class _Backend:
    """What RowTokenizer asks a tokenizer for."""

    def __init__(self, backend):
        self.backend_tokenizer = backend


def test_a_tokenizer_that_never_writes_its_text_is_no_longer_tried(tokenizer, monkeypatch):
    """One that lower-cases, say: the labels are right, by offsets."""
    backend = Tokenizer(models.WordLevel({"[x]": 0, "a": 1, "b": 2}, unk_token="[x]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    items = rendered(tokenizer, "Ab ", count=2 * FEW)
    lower = _Backend(backend)
    rows = RowTokenizer(lower)
    same(rows.rows(items, length=2048), tokenize_conversations(lower, items))
    monkeypatch.setattr(TokenBytes, "writes", None)
    same(rows.rows(items, length=2048), tokenize_conversations(lower, items))


def test_which_vocabularies_are_byte_level(tokenizers):
    assert is_byte_level(tokenizers["tiny-qwen3"].backend_tokenizer)
    assert not is_byte_level(tokenizers["tiny-llama"].backend_tokenizer)
    pieces = TokenBytes(tokenizers["tiny-llama"].backend_tokenizer).pieces
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)
