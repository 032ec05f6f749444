"""tokenizer.model written by hand, read by the sentencepiece library."""

from __future__ import annotations

import pytest
import sentencepiece
from dropforge.models.sentencepiece_file import Piece, PieceType, byte_piece, pieces_from_bpe, sentencepiece_model

VOCAB = [
    "<unk>",
    "<s>",
    "</s>",
    *(byte_piece(value) for value in range(256)),
    "ab",
    "abc",
    "▁a",
    "a",
    "b",
    "c",
    "▁",
    "<extra>",
]
MERGES = [("a", "b"), ("ab", "c"), ("▁", "a")]


def load(**options):
    pieces = pieces_from_bpe(
        {text: index for index, text in enumerate(VOCAB)}, MERGES, special=["<s>", "</s>"], unused=["<extra>"]
    )
    return sentencepiece.SentencePieceProcessor(
        model_proto=sentencepiece_model(pieces, bos_id=1, eos_id=2, pad_id=-1, **options)
    )


def test_types_scores_and_ids():
    model = load()
    assert [model.id_to_piece(i) for i in range(len(VOCAB))] == VOCAB
    scores = [model.get_score(VOCAB.index(text)) for text in ("ab", "abc", "▁a", "a")]
    assert scores == [0, -1, -2, -3]
    assert model.is_unknown(0) and model.is_control(1) and model.is_control(2)
    assert model.is_byte(3) and not model.is_byte(VOCAB.index("ab"))
    assert model.is_unused(VOCAB.index("<extra>"))
    assert (model.bos_id(), model.eos_id(), model.pad_id()) == (1, 2, -1)


def test_merges_follow_the_ranks_and_bytes_are_the_fallback():
    model = load()
    assert model.encode("abcab", out_type=str) == ["abc", "ab"]
    # "ab" ranks before "▁a"
    assert model.encode(" ab", out_type=str) == ["▁", "ab"]
    assert model.encode("é", out_type=str) == ["<0xC3>", "<0xA9>"]
    assert model.decode(model.encode("  a é\n")) == "  a é\n"


def test_the_space_prefix_is_an_option():
    assert load(add_dummy_prefix=True).encode("c", out_type=str) == ["▁", "c"]
    assert load().encode("c", out_type=str) == ["c"]


def test_ids_with_a_gap_are_refused():
    with pytest.raises(ValueError, match="without a gap"):
        pieces_from_bpe({"a": 0, "b": 2}, [], special=[])


def test_piece_types_are_those_of_the_format():
    assert Piece(text="a", score=0.0).type == PieceType.NORMAL == 1
    assert [kind.value for kind in PieceType] == [1, 2, 3, 4, 5, 6]
