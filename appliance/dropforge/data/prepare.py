"""From the spec's data section to token rows with labels: read, detect, convert, render, tokenise, split, weigh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.data.column_template import ColumnTemplate, parse
from dropforge.data.convert import Conversation, Document, Dropped, convert
from dropforge.data.detect import Match, detect
from dropforge.data.mixture import split, weighted
from dropforge.data.render import Renderer
from dropforge.data.report import FIRST_DROPPED, DataReport, FileReport
from dropforge.data.rows import Row
from dropforge.data.sources import Locate, Part, open_source
from dropforge.data.table import Indices, TokenTable
from dropforge.data.tokenize import Tokens, tokenize_conversations, tokenize_document, truncated
from dropforge.errors import DataError
from dropforge.spec import ColumnsFormat, SourceSpec, Spec

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

SAMPLE_ROWS = 100
"""So many rows decide the format."""
BATCH_ROWS = 512
FEW_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Token rows ready for training: columns input_ids and labels (lists of integers, -100 where nothing is learnt)."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: DataReport


def prepare_data(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    locate: Locate,
    log: Callable[[str], None] = lambda text: None,
    work: Path | None = None,
) -> PreparedData:
    """Read and tokenise everything the spec names. The same spec, files and tokenizer give the same rows.

    Args:
        spec: a resolved spec; uses `data`, `model.max_seq_length` and `train.seed`.
        tokenizer: from `load_tokenizer`, with a chat template.
        locate: gives the safe path of a name in the spec, or raises DataError data-missing.
        log: takes one sentence per thing worth telling.
        work: folder for large sets, which are then mapped from disk instead of held in memory.

    Raises DataError with file and row for everything that cannot be understood, and when nothing is left to learn.
    """
    seed = spec.train.seed
    reading = _Reading(spec=spec, tokenizer=tokenizer, locate=locate, log=log)
    table = TokenTable(file=work / "train.arrow" if work else None)
    reading.read(spec.data.train, table)
    reading.refuse_empty(table)
    train, evaluation = _all(table), None
    eval_rows = 0
    if spec.data.eval and spec.data.eval.fraction:
        train, held_out = split(table, fraction=spec.data.eval.fraction, seed=seed)
        evaluation, eval_rows = (table.dataset(held_out), len(held_out)) if len(held_out) else (None, 0)
    elif spec.data.eval:
        eval_reading = _Reading(spec=spec, tokenizer=tokenizer, locate=locate, log=log)
        eval_table = TokenTable(file=work / "eval.arrow" if work else None)
        eval_reading.read(spec.data.eval.sources, eval_table)
        eval_reading.refuse_empty(eval_table)
        evaluation, eval_rows = eval_table.dataset(_all(eval_table)), len(eval_table)
    weights = [source.weight for source in spec.data.train]
    train = weighted(train, sources=table.sources, weights=weights, seed=seed)
    report = reading.report(table, train, eval_rows=eval_rows)
    for warning in report.warnings:
        log(f"warning: {warning}")
    return PreparedData(train=table.dataset(train), eval=evaluation, report=report)


def _all(table: TokenTable) -> Indices:
    import numpy as np

    return np.arange(len(table), dtype=np.int64)


@dataclass(kw_only=True)
class _Reading:
    """Reads sources into a table and counts what happens on the way."""

    spec: Spec
    tokenizer: PreTrainedTokenizerBase
    locate: Locate
    log: Callable[[str], None]
    files: list[FileReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    systems: set[str | None] = field(default_factory=set)
    rows_read: int = 0
    truncated: int = 0
    rewritten: int = 0
    renderer: Renderer | None = None

    def read(self, sources: Sequence[SourceSpec], table: TokenTable) -> None:
        for number, source in enumerate(sources):
            for part in open_source(source, locate=self.locate, warn=self._warn):
                self._read_part(part, table, source=number)

    def _read_part(self, part: Part, table: TokenTable, *, source: int) -> None:
        rows = part.rows()
        sample = list(islice(rows, SAMPLE_ROWS))
        if not sample:
            raise DataError(
                f"{part.name} holds no rows", code="data-empty", where=part.name, fix="put at least one row into it"
            )
        match, templates = self._match(sample, part.name)
        self.log(f"{part.name}: format {match.format}, because {match.reason}")
        count = 0
        for batch in _batches(chain(sample, rows)):
            count += len(batch)
            self._add(batch, match, templates, table, source=source)
        self.rows_read += count
        self.files.append(
            FileReport(
                path=part.name, sha256=part.sha256, bytes=part.bytes, rows=count,
                format=match.format, format_reason=match.reason,
            )
        )  # fmt: skip

    def _match(self, sample: Sequence[Row], name: str) -> tuple[Match, tuple[ColumnTemplate, ColumnTemplate] | None]:
        wanted = self.spec.data.format
        if not isinstance(wanted, ColumnsFormat):
            match = detect([row.fields for row in sample], file=name, forced=wanted)
            used = set(match.columns.values())
            unused = sorted({column for row in sample for column in row.fields} - used)
            if unused and match.format != "text":
                self._warn(f"{name}: columns not used: {', '.join(unused[:10])}")
            return match, None
        prompt = _parse(wanted.columns.prompt, "prompt")
        text = wanted.columns.response
        response = _parse(text if "{" in text else "{" + text + "}", "response")
        return Match(format="columns", reason="data.format names the columns"), (prompt, response)

    def _add(
        self,
        batch: Sequence[Row],
        match: Match,
        templates: tuple[ColumnTemplate, ColumnTemplate] | None,
        table: TokenTable,
        *,
        source: int,
    ) -> None:
        conversations: list[Conversation] = []
        for row in batch:
            item = convert(row, match, system=self.spec.data.system, templates=templates)
            if isinstance(item, Dropped):
                self._drop(item.row, item.why)
            elif isinstance(item, Document):
                length = self.spec.model.max_seq_length
                self._keep(
                    [(row, piece) for piece in tokenize_document(self.tokenizer, item.text, length=length)],
                    table,
                    source,
                )
            else:
                conversations.append(item)
        if conversations:
            self._keep(self._tokenize(conversations), table, source)

    def _tokenize(self, conversations: Sequence[Conversation]) -> list[tuple[Row, Tokens]]:
        if self.renderer is None:
            self.renderer = Renderer(self.tokenizer)
        rendered = []
        for item in conversations:
            first = item.turns[0]
            if len(self.systems) < 2:
                self.systems.add(first["content"] if first["role"] == "system" else None)
            rendered.append(self.renderer.render(item.turns, where=item.row.where))
        self.rewritten += sum(item.rewritten for item in rendered)
        everything = self.spec.data.train_on == "everything"
        rows = tokenize_conversations(self.tokenizer, rendered, everything=everything)
        return [(item.row, tokens) for item, tokens in zip(conversations, rows, strict=True)]

    def _keep(self, rows: Sequence[tuple[Row, Tokens]], table: TokenTable, source: int) -> None:
        length = self.spec.model.max_seq_length
        kept = []
        for row, tokens in rows:
            if len(tokens.input_ids) > length:
                tokens = truncated(tokens, length=length)
                self.truncated += 1
            if tokens.learnt:
                kept.append(tokens)
            elif len(tokens.input_ids) == length:
                self._drop(row, f"no answer begins within the first {length} tokens (model.max_seq_length)")
            else:
                self._drop(row, "none of its tokens is learnt")
        table.add(kept, source=source)

    def _drop(self, row: Row, why: str) -> None:
        self.reasons[why] += 1
        if len(self.dropped) < FIRST_DROPPED:
            self.dropped.append((row.where, why))

    def _warn(self, text: str) -> None:
        self.warnings.append(text)

    def refuse_empty(self, table: TokenTable) -> None:
        """Nothing trains when nothing is left to learn from."""
        if len(table):
            return
        where, why = self.dropped[0]
        raise DataError(
            f"none of the {self.rows_read} rows has anything to learn",
            code="data-all-masked",
            where=where,
            why="; ".join(f"{count} rows: {reason}" for reason, count in self.reasons.most_common(3)),
            fix="raise model.max_seq_length" if "max_seq_length" in why else "fill in the answers",
        )

    def report(self, table: TokenTable, train: Indices, *, eval_rows: int) -> DataReport:
        lengths = table.lengths[train]
        formats = dict.fromkeys(file.format for file in self.files)
        system = next(iter(self.systems)) if len(self.systems) == 1 else None
        return DataReport(
            files=tuple(self.files),
            format=" + ".join(formats),
            format_reason="; ".join(dict.fromkeys(file.format_reason for file in self.files)),
            rows_read=self.rows_read,
            rows=len(train),
            eval_rows=eval_rows,
            rows_dropped=sum(self.reasons.values()),
            dropped=tuple(self.dropped),
            dropped_reasons=dict(self.reasons.most_common()),
            truncated=self.truncated,
            tokens=int(lengths.sum()),
            trained_tokens=int(table.learnt[train].sum()),
            longest=int(lengths.max()),
            end_of_turn=self.renderer.end_of_turn if self.renderer else "",
            system=system,
            warnings=(*self.warnings, *self._more_warnings(len(train))),
        )

    def _more_warnings(self, rows: int) -> Iterator[str]:
        if self.reasons:
            first = self.dropped[0]
            yield f"{sum(self.reasons.values())} rows dropped, the first is {first[0]}: {first[1]}"
        if self.truncated:
            yield f"{self.truncated} rows were cut to {self.spec.model.max_seq_length} tokens (model.max_seq_length)"
        if self.rewritten:
            yield f"the chat template rewrote contents of {self.rewritten} rows, for example by splitting off reasoning"
        if self.renderer and not self.renderer.end_of_turn:
            yield "the chat template ends an answer without a special token, so the model will not learn when to stop"
        if rows < FEW_ROWS:
            yield f"only {rows} training rows; a few hundred good ones usually do much better"


def _parse(text: str, name: str) -> ColumnTemplate:
    try:
        return parse(text)
    except ValueError as error:
        raise DataError(
            f"data.format.columns.{name} is not valid",
            code="data-column-template",
            where=f"data.format.columns.{name}",
            why=str(error),
            fix='write for example "Capital of {Country}?[[ On the {River}?]]"',
        ) from error


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch
