"""Texts and spans to token ids and labels. A label is the token's id where it is learnt and -100 elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropforge.data.render import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One training row; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """How many tokens the loss sees. The first token has nothing before it and is never predicted."""
        return len(self.labels) - self.labels.count(IGNORED) - (self.labels[:1] not in ([], [IGNORED]))


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered], *, everything: bool = False
) -> list[Tokens]:
    """One row per conversation; the template's text already holds every special token.

    A token belongs to an answer when its last character does. (A token that also covers the blank before the answer
    is what the model produces there; one that runs past the end of the answer is not.)
    """
    backend = tokenizer.backend_tokenizer  # faster than the tokenizer itself, which copies every offset
    backend.no_truncation()
    backend.no_padding()
    rows = []
    for item, encoding in zip(
        rendered, backend.encode_batch([item.text for item in rendered], add_special_tokens=False), strict=True
    ):
        ids = encoding.ids
        rows.append(Tokens(input_ids=ids, labels=list(ids) if everything else _mask(ids, encoding, item)))
    return rows


def _mask(ids: list[int], encoding: Any, item: Rendered) -> list[int]:
    labels = [IGNORED] * len(ids)
    for start, end in item.spans:
        first = _first_ending_behind(encoding, start, item)
        last = _first_ending_behind(encoding, end, item)
        labels[first:last] = ids[first:last]
    return labels


def _first_ending_behind(encoding: Any, position: int, item: Rendered) -> int:
    """The number of the first token that ends behind a character position; tokens that end before it are fewer."""
    if position >= len(item.text):
        return len(encoding.ids)
    token = encoding.char_to_token(position)
    if token is not None:
        return int(token)
    # A character that the tokenizer's normaliser took away lies in no token.
    return bisect_left([end for _, end in encoding.offsets], position + 1)


def document_rows(tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, overlap: int = 0) -> list[Tokens]:
    """A plain text with the tokenizer's own begin token and an end token, cut into rows of at most `length`.

    Nothing is lost by the cutting; everything is learnt. `overlap` tokens at the end of a row are repeated at the
    beginning of the next one, there with labels -100 (they are context, and were learnt already).
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    rows = [Tokens(input_ids=ids[:length], labels=ids[:length])]
    step = length - overlap
    for start in range(step, len(ids) - overlap, step):
        piece = ids[start : start + length]
        rows.append(Tokens(input_ids=piece, labels=[IGNORED] * overlap + piece[overlap:]))
    return rows


def truncated(row: Tokens, *, length: int) -> Tokens:
    """The first `length` tokens."""
    return Tokens(input_ids=row.input_ids[:length], labels=row.labels[:length])
