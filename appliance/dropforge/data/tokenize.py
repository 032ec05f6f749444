"""Texts and spans to token ids and labels. A label is the token's id where it is learnt and -100 elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        return sum(label != IGNORED for label in self.labels[1:])


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered], *, everything: bool = False
) -> list[Tokens]:
    """One row per conversation; the template's text already holds every special token.

    A token belongs to an answer when its last character does. (A token that also covers the blank before the answer
    is what the model produces there; one that runs past the end of the answer is not.)
    """
    encoded = tokenizer(
        [item.text for item in rendered], add_special_tokens=False, return_offsets_mapping=True,
        return_attention_mask=False, verbose=False,
    )  # fmt: skip
    rows = []
    for item, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        labels = list(ids) if everything else _mask(ids, offsets, item.spans)
        rows.append(Tokens(input_ids=ids, labels=labels))
    return rows


def _mask(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    ends = [end for _, end in offsets]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first = bisect_left(ends, start + 1)  # the first token that ends behind `start`
        last = bisect_left(ends, end + 1)  # the first one that ends behind `end`
        labels[first:last] = ids[first:last]
    return labels


def tokenize_document(tokenizer: PreTrainedTokenizerBase, text: str, *, length: int) -> list[Tokens]:
    """A plain text with the tokenizer's own begin token and an end token, cut into consecutive rows of at most
    `length`.

    Nothing is lost by the cutting; everything is learnt.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return [
        Tokens(input_ids=ids[start : start + length], labels=ids[start : start + length])
        for start in range(0, len(ids), length)
    ]


def truncated(row: Tokens, *, length: int) -> Tokens:
    """The first `length` tokens."""
    return Tokens(input_ids=row.input_ids[:length], labels=row.labels[:length])
