"""Raw text: chunks that overlap, chunks that do not, and documents too long to be tokenised at once."""

from __future__ import annotations

import pytest

TEXT = "\n".join(f"Line {i} of the logbook says that the sea was calm." for i in range(60))


def joined(data):
    return [token for row in data.train for token in row["input_ids"]]


def test_chunks_lose_nothing_and_end_with_the_end_token(bench):
    data = bench.prepare(bench.write("a.txt", TEXT), length=64)
    ids = bench.tokenizer(TEXT)["input_ids"] + [bench.tokenizer.eos_token_id]
    assert joined(data) == ids
    assert all(row["labels"] == row["input_ids"] for row in data.train)


@pytest.mark.parametrize("overlap", [1, 16, 40])
def test_overlapping_chunks_learn_every_token_once(bench, overlap):
    data = bench.prepare({"train": bench.write("a.txt", TEXT), "chunk_overlap": overlap}, length=64)
    ids = bench.tokenizer(TEXT)["input_ids"] + [bench.tokenizer.eos_token_id]
    learnt = [label for row in data.train for label in row["labels"] if label != -100]
    assert learnt == ids
    rows = list(data.train)
    for before, after in zip(rows, rows[1:], strict=False):
        assert after["input_ids"][:overlap] == before["input_ids"][-overlap:]
        assert after["labels"][:overlap] == [-100] * overlap
    assert all(len(row["input_ids"]) <= 64 for row in rows)


def test_each_document_has_its_own_boundaries(bench):
    bench.write("books/a.txt", "The sea was calm.")
    bench.write("books/b.md", "# The land\n\nwas dry.")
    data = bench.prepare("books", length=64)
    assert [bench.tokenizer.decode(row["input_ids"]) for row in data.train] == [
        "<s>The sea was calm.<|im_end|>",
        "<s># The land\n\nwas dry.<|im_end|>",
    ]


def test_an_overlap_as_long_as_the_rows_is_refused(bench):
    error = bench.error({"train": bench.write("a.txt", TEXT), "chunk_overlap": 64}, length=64)
    assert error.code == "data-overlap"


def test_long_documents_are_tokenised_in_pieces(bench, monkeypatch):
    whole = joined(bench.prepare(bench.write("a.txt", TEXT), length=64))
    monkeypatch.setattr("dropforge.data.tokenize.PIECE", 200)
    pieces = joined(bench.prepare("a.txt", length=64))
    assert bench.tokenizer.decode(pieces) == bench.tokenizer.decode(whole)
    assert pieces.count(bench.tokenizer.bos_token_id) == pieces.count(bench.tokenizer.eos_token_id) == 1
