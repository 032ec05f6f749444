"""Texts and spans to token ids and labels. A label is the token's id where it is learnt and -100 elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropforge.data.shapes import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
CHARACTERS_PER_TOKEN = 24
"""Texts with more characters than this per token are rare: such a text is tokenised whole after all."""
PIECE = 2_000_000
"""Longer documents are tokenised in pieces of about so many characters, cut at line ends, to bound the memory."""


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
    tokenizer: PreTrainedTokenizerBase,
    rendered: Sequence[Rendered],
    *,
    everything: bool = False,
    length: int | None = None,
) -> list[Tokens]:
    """One row per conversation; the template's text already holds every special token.

    Of texts that are far too long for `length` tokens only the beginning is tokenised (more than `length` of them).

    A token belongs to an answer when its last character does. (A token that also covers the blank before the answer
    is what the model produces there; one that runs past the end of the answer is not.)
    """
    backend = tokenizer.backend_tokenizer  # faster than the tokenizer itself, which copies every offset
    whole_texts(backend)
    return [
        Tokens(input_ids=one.ids, labels=list(one.ids) if everything else mask_of(one, item))
        for one, item in encoded(backend, rendered, length=length)
    ]


def whole_texts(backend: Any) -> None:
    """Neither cut texts nor fill them up."""
    if backend.truncation is not None or backend.padding is not None:
        backend.no_truncation()
        backend.no_padding()


def encoded(backend: Any, rendered: Sequence[Rendered], *, length: int | None) -> Iterator[tuple[Any, Rendered]]:
    """The tokenizers library's Encoding of each text, and the conversation as far as it was tokenised."""
    most = None if length is None else CHARACTERS_PER_TOKEN * length + 1000
    texts = [item.text if most is None or len(item.text) <= most else item.text[:most] for item in rendered]
    for item, text, encoding in zip(
        rendered, texts, backend.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        if len(text) == len(item.text):
            yield encoding, item
        elif length is None or len(encoding.ids) <= length + 1:
            # The last token of a cut text may be another one than in the whole.
            yield backend.encode(item.text, add_special_tokens=False), item
        else:
            yield encoding, Rendered(text=text, spans=_within(item.spans, len(text)), rewritten=item.rewritten)


def mask_of(encoding: Any, item: Rendered) -> list[int]:
    """Labels by the tokenizer's offsets."""
    ids: list[int] = encoding.ids
    labels = [IGNORED] * len(ids)
    for start, end in item.spans:
        first = _first_ending_behind(encoding, start, item)
        last = _first_ending_behind(encoding, end, item)
        labels[first:last] = ids[first:last]
    return labels


def _within(spans: Sequence[tuple[int, int]], end: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(stop, end)) for start, stop in spans if start < end)


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
    ids: list[int] = []
    backend = tokenizer.backend_tokenizer
    whole_texts(backend)
    for index, part in enumerate(_pieces(text)):
        ids += backend.encode_batch_fast([part], add_special_tokens=index == 0)[0].ids
        if index == 0 and len(part) < len(text) and ids[-1:] == [tokenizer.eos_token_id]:
            ids.pop()  # a tokenizer that ends every text itself
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    rows = [Tokens(input_ids=ids[:length], labels=ids[:length])]
    step = length - overlap
    for start in range(step, len(ids) - overlap, step):
        piece = ids[start : start + length]
        rows.append(Tokens(input_ids=piece, labels=[IGNORED] * overlap + piece[overlap:]))
    return rows


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1
        end = end if end > start else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def truncated(row: Tokens, *, length: int) -> Tokens:
    """The first `length` tokens."""
    return Tokens(input_ids=row.input_ids[:length], labels=row.labels[:length])
