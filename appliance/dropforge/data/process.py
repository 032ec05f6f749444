"""One batch of rows to tokens: convert, render, tokenise, cut. Runs in this process or in a worker, with one result.

L rows kept, T tokens of them all.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dropforge.data.column_template import ColumnTemplate
from dropforge.data.convert import Conversation, Document, Dropped, convert
from dropforge.data.detect import Match
from dropforge.data.languages import language
from dropforge.data.near import signature
from dropforge.data.render import Renderer
from dropforge.data.rows import Row
from dropforge.data.tokenize import Tokens, document_rows, tokenize_conversations, truncated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST = 20
"""So many dropped or suspicious rows are remembered by number."""
LANGUAGE_EVERY = 16
"""Of so many rows one is looked at for its language."""
_PAIR = ["user", "assistant"]
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._renderer: Renderer | None = None
        self._making = Lock()

    @property
    def renderer(self) -> Renderer:
        with self._making:
            if self._renderer is None:
                self._renderer = Renderer(self.tokenizer)
            return self._renderer

    def process(self, rows: Sequence[Row], work: Work) -> tuple[Batch, Counts]:
        """Raises DataError with file and row for what cannot be understood."""
        counts = Counts(read=len(rows))
        kept: list[_Kept] = []
        conversations: list[Conversation] = []
        for row in rows:
            item = convert(row, work.match, system=work.system, templates=work.templates)
            if isinstance(item, Dropped):
                counts.drop(item.row, item.why)
            elif isinstance(item, Document):
                if row.number % LANGUAGE_EVERY == 1:
                    counts.languages[language(item.text)] += 1
                pieces = document_rows(self.tokenizer, item.text, length=work.length, overlap=work.overlap)
                for piece in pieces:
                    self._keep(row, piece, item.text if len(pieces) == 1 else "", work, counts, kept)
            else:
                conversations.append(item)
        if conversations:
            render = self.renderer.render
            rendered = [render(item.turns, where=item.row.where, tools=item.tools) for item in conversations]
            self._count(conversations, counts)
            counts.rewritten += sum(item.rewritten for item in rendered)
            tokens = tokenize_conversations(self.tokenizer, rendered, everything=work.everything, length=work.length)
            for item, row_tokens in zip(conversations, tokens, strict=True):
                text = " ".join(turn["content"] for turn in item.turns) if work.loose else ""
                self._keep(item.row, row_tokens, text, work, counts, kept)
        return _batch(kept, loose=work.loose, signatures=work.signatures), counts

    @staticmethod
    def _count(conversations: Sequence[Conversation], counts: Counts) -> None:
        roles: list[str] = []
        for item in conversations:
            own = [turn["role"] for turn in item.turns]
            roles += own
            if len(counts.systems) < 2:
                system = item.turns[0]["content"] if own[0] == "system" else None
                if system not in counts.systems:
                    counts.systems.append(system)
            if item.row.number % LANGUAGE_EVERY == 1:
                counts.languages[language(" ".join(turn["content"] for turn in item.turns))] += 1
            if own != _PAIR and any(one == two and one in _PAIR for one, two in zip(own, own[1:], strict=False)):
                counts.repeated_roles += 1
                if len(counts.repeated_where) < FIRST:
                    counts.repeated_where.append(item.row.where)
        counts.roles.update(roles)

    @staticmethod
    def _keep(row: Row, tokens: Tokens, text: str, work: Work, counts: Counts, kept: list[_Kept]) -> None:
        full = len(tokens.input_ids)
        if full > work.length:
            tokens = truncated(tokens, length=work.length)
            counts.truncated += 1
            if len(counts.truncated_where) < FIRST:
                counts.truncated_where.append(row.where)
        if tokens.learnt:
            kept.append(_Kept(row=row, tokens=tokens, text=text, full=full))
        elif len(tokens.input_ids) == work.length:
            counts.drop(row, f"no answer begins within the first {work.length} tokens (model.max_seq_length)")
        else:
            counts.drop(row, "none of its tokens is learnt")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A row with something to learn; `text` is what is compared with other rows, `full` its tokens before cutting."""

    row: Row
    tokens: Tokens
    text: str
    full: int


def _batch(kept: Sequence[_Kept], *, loose: bool, signatures: bool) -> Batch:
    ids = [array("i", row.tokens.input_ids).tobytes() for row in kept]
    labels = [array("i", row.tokens.labels).tobytes() for row in kept]
    digests = _digests(one + other for one, other in zip(ids, labels, strict=True))
    return Batch(
        ids=np.frombuffer(b"".join(ids), dtype=np.int32),
        labels=np.frombuffer(b"".join(labels), dtype=np.int32),
        ends=np.cumsum([len(row.tokens.input_ids) for row in kept], dtype=np.int64),
        numbers=np.asarray([row.row.number for row in kept], dtype=np.int64),
        digests=digests,
        loose=_digests(_LOOSE.sub("", row.text.casefold()).encode() or own for row, own in zip(kept, ids, strict=True))
        if loose
        else digests,
        learnt=np.asarray([row.tokens.learnt for row in kept], dtype=np.int32),
        full=np.asarray([row.full for row in kept], dtype=np.int32),
        signatures=np.stack([signature(row.text) for row in kept])
        if signatures and kept
        else np.empty((0, 32), dtype=np.uint32),
    )


def _digests(contents: Any) -> npt.NDArray[np.uint64]:
    raw = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)
