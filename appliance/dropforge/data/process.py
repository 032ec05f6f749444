"""One batch of rows to tokens: convert, render, tokenise, cut. Runs in this process or in a worker, with one result.

L rows kept, T tokens of them all.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dropforge.data.column_template import ColumnTemplate
from dropforge.data.convert import Conversation, Document, convert, refuse_surrogates
from dropforge.data.detect import Match
from dropforge.data.languages import language
from dropforge.data.near import signature
from dropforge.data.render import Renderer
from dropforge.data.rows import Row
from dropforge.data.sent_tokenizer import sent
from dropforge.data.token_rows import RowTokenizer, TokenRows, flat
from dropforge.data.tokenize import IGNORED, document_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST = 20
"""So many dropped or suspicious rows are remembered by number."""
LANGUAGE_ALL = 1000
"""Up to this row each is looked at for its language."""
LANGUAGE_EVERY = 16
"""After that one of so many."""
_PAIR = ("user", "assistant")
_LOOSE = re.compile(r"[\W_]+")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is done with every row of a file."""

    match: Match
    templates: tuple[ColumnTemplate, ColumnTemplate] | None
    system: str | None
    everything: bool
    length: int
    overlap: int = 0
    """Tokens that consecutive chunks of a document share."""
    loose: bool = False
    """Whether rows that say the same will be looked for."""
    signatures: bool = False
    """Whether near-duplicates will be looked for."""


@dataclass(kw_only=True)
class Counts:
    """What happened on the way. Adds up over batches."""

    read: int = 0
    truncated: int = 0
    truncated_where: list[str] = field(default_factory=list)
    rewritten: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    roles: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    systems: list[str | None] = field(default_factory=list)
    """At most two different system texts (None: a conversation without one)."""
    repeated_roles: int = 0
    repeated_where: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.read += other.read
        self.truncated += other.truncated
        self.rewritten += other.rewritten
        self.repeated_roles += other.repeated_roles
        self.reasons.update(other.reasons)
        self.roles.update(other.roles)
        self.languages.update(other.languages)
        self.truncated_where = (self.truncated_where + other.truncated_where)[:FIRST]
        self.dropped = (self.dropped + other.dropped)[:FIRST]
        self.repeated_where = (self.repeated_where + other.repeated_where)[:FIRST]
        self.systems = list(dict.fromkeys([*self.systems, *other.systems]))[:2]

    def drop(self, row: Row, why: str) -> None:
        self.reasons[why] += 1
        if len(self.dropped) < FIRST:
            self.dropped.append((row.where, why))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token rows one after the other: `ids` and `labels` (T), `ends` (L) where each row ends in them, and per row the
    number in its file, a digest of tokens and labels, a digest of the letters alone, how many tokens are learnt, how
    many there were before cutting, and a signature (L, 32) or (0, 32).
    """

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    loose: npt.NDArray[np.uint64]
    learnt: npt.NDArray[np.int32]
    full: npt.NDArray[np.int32]
    signatures: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.ends)


class RowProcessor:
    """Turns batches of rows into tokens with one tokenizer. Several threads may use one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, renderer: Renderer | None = None) -> None:
        self.tokenizer = tokenizer
        self._renderer = renderer
        self._rows: RowTokenizer | None = None
        self._making = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: with the shapes of conversations that are known here."""
        tokenizer = sent(self.tokenizer)
        return _processor, (tokenizer, self._renderer.serving(tokenizer) if self._renderer else None)

    @property
    def renderer(self) -> Renderer:
        with self._making:
            if self._renderer is None:
                self._renderer = Renderer(self.tokenizer)
            return self._renderer

    @property
    def row_tokenizer(self) -> RowTokenizer:
        with self._making:
            if self._rows is None:
                self._rows = RowTokenizer(self.tokenizer)
            return self._rows

    def process(self, rows: Sequence[Row], work: Work) -> tuple[Batch, Counts]:
        """Raises DataError with file and row for what cannot be understood."""
        try:
            return self._process(rows, work)
        except (TypeError, UnicodeEncodeError):
            # The tokenizer refuses a whole batch for one text that is none.
            for row in rows:
                refuse_surrogates(row)
            raise

    def _process(self, rows: Sequence[Row], work: Work) -> tuple[Batch, Counts]:
        counts = Counts(read=len(rows))
        documents: list[Document] = []
        conversations: list[Conversation] = []
        for row in rows:
            item = convert(row, work.match, system=work.system, templates=work.templates)
            if isinstance(item, Conversation):
                conversations.append(item)
            elif isinstance(item, Document):
                documents.append(item)
            else:
                counts.drop(item.row, item.why)
        # One file is either or: the format is the same for all of its rows.
        if documents:
            return self._documents(documents, work, counts), counts
        return self._conversations(conversations, work, counts), counts

    def _documents(self, documents: Sequence[Document], work: Work, counts: Counts) -> Batch:
        rows: list[Row] = []
        texts: list[str] = []
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        for item in documents:
            if _sampled(item.row.number):
                counts.languages[language(item.text)] += 1
            pieces = document_rows(self.tokenizer, item.text, length=work.length, overlap=work.overlap)
            for piece in pieces:
                rows.append(item.row)
                texts.append(item.text if len(pieces) == 1 else "")
                ids.append(piece.input_ids)
                labels.append(piece.labels)
        all_ids, ends = flat(ids)
        return _batch(TokenRows(ids=all_ids, labels=flat(labels)[0], ends=ends), rows, texts, work, counts)

    def _conversations(self, conversations: Sequence[Conversation], work: Work, counts: Counts) -> Batch:
        render = self.renderer.render
        rendered = [render(item.turns, where=item.row.where, tools=item.tools) for item in conversations]
        _count(conversations, counts)
        counts.rewritten += sum(item.rewritten for item in rendered)
        tokens = self.row_tokenizer.rows(rendered, everything=work.everything, length=work.length)
        texts = [" ".join([turn["content"] for turn in item.turns]) if work.loose else "" for item in conversations]
        return _batch(tokens, [item.row for item in conversations], texts, work, counts)


def _sampled(number: int) -> bool:
    """Scattered (Knuth's multiplicative hash), because languages may alternate by row."""
    return number <= LANGUAGE_ALL or (number * 2654435761 & 0xFFFFFFFF) < (1 << 32) // LANGUAGE_EVERY


def _processor(tokenizer: PreTrainedTokenizerBase, renderer: Renderer | None) -> RowProcessor:
    return RowProcessor(tokenizer, renderer=renderer)


def _count(conversations: Sequence[Conversation], counts: Counts) -> None:
    shapes: Counter[tuple[str, ...]] = Counter()
    for item in conversations:
        turns = item.turns
        own = tuple([turn["role"] for turn in turns])
        shapes[own] += 1
        if len(counts.systems) < 2:
            system = turns[0]["content"] if own[0] == "system" else None
            if system not in counts.systems:
                counts.systems.append(system)
        if _sampled(item.row.number):
            counts.languages[language(" ".join([turn["content"] for turn in turns]))] += 1
        if own != _PAIR and any(one == two and one in _PAIR for one, two in zip(own, own[1:], strict=False)):
            counts.repeated_roles += 1
            if len(counts.repeated_where) < FIRST:
                counts.repeated_where.append(item.row.where)
    for own, times in shapes.items():
        for role in own:
            counts.roles[role] += times


def _batch(tokens: TokenRows, rows: Sequence[Row], texts: Sequence[str], work: Work, counts: Counts) -> Batch:
    """Cut to `work.length`, and without the rows that have nothing to learn; both are counted."""
    full = np.diff(tokens.ends, prepend=0)
    for index in np.flatnonzero(full > work.length).tolist():
        counts.truncated += 1
        if len(counts.truncated_where) < FIRST:
            counts.truncated_where.append(rows[index].where)
    lengths = np.minimum(full, work.length)
    learnt = _learnt(tokens, lengths)
    kept = np.flatnonzero(learnt > 0)
    for index in np.flatnonzero(learnt <= 0).tolist():
        too_long = lengths[index] == work.length
        counts.drop(
            rows[index],
            f"no answer begins within the first {work.length} tokens (model.max_seq_length)"
            if too_long
            else "none of its tokens is learnt",
        )
    ids, labels, ends = tokens.ids, tokens.labels, tokens.ends
    if len(kept) < len(rows) or counts.truncated:
        chosen = _positions(tokens.ends - full, lengths, kept)
        ids, labels, ends = ids[chosen], labels[chosen], np.cumsum(lengths[kept])
    digests = _row_digests(ids, labels, ends)
    said = [texts[index] for index in kept.tolist()]
    return Batch(
        ids=ids, labels=labels, ends=ends, digests=digests,
        numbers=np.asarray([rows[index].number for index in kept.tolist()], dtype=np.int64),
        loose=_loose_digests(said, ids, ends) if work.loose else digests,
        learnt=learnt[kept].astype(np.int32),
        full=full[kept].astype(np.int32),
        signatures=np.stack([signature(text) for text in said])
        if work.signatures and said
        else np.empty((0, 32), dtype=np.uint32),
    )  # fmt: skip


def _learnt(tokens: TokenRows, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(R,) tokens that the loss sees of each row's first `lengths`; the first of a row is never predicted."""
    begins = np.concatenate([[0], tokens.ends[:-1]]).astype(np.int64)[: len(tokens.ends)]
    so_far = np.concatenate([[0], np.cumsum(tokens.labels != IGNORED)])
    found: npt.NDArray[np.int64] = so_far[begins + lengths] - so_far[np.minimum(begins + 1, begins + lengths)]
    return found


def _positions(
    begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Where the first `lengths` tokens of the chosen rows stand."""
    sizes = lengths[rows]
    starts = np.repeat(begins[rows] - (np.cumsum(sizes) - sizes), sizes)
    return starts + np.arange(len(starts))


def _row_digests(
    ids: npt.NDArray[np.int32], labels: npt.NDArray[np.int32], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    one, two = memoryview(ids.tobytes()), memoryview(labels.tobytes())
    stops = (ends * ids.itemsize).tolist()
    found = []
    for start, stop in zip([0, *stops], stops, strict=False):
        digest = hashlib.blake2b(one[start:stop], digest_size=8)
        digest.update(two[start:stop])
        found.append(digest.digest())
    return np.frombuffer(b"".join(found), dtype="<u8").astype(np.uint64)


def _loose_digests(
    texts: Sequence[str], ids: npt.NDArray[np.int32], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """Of the letters and digits of each text, or of its tokens where it has none."""
    own = memoryview(ids.tobytes())
    stops = (ends * ids.itemsize).tolist()
    contents = (
        _LOOSE.sub("", text.casefold()).encode() or own[start:stop]
        for text, start, stop in zip(texts, [0, *stops], stops, strict=False)
    )
    raw = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)
