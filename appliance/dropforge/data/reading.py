"""Sources of a spec read into a table of tokens, with everything counted that happens on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from dropforge.data.blocks import Block, row_blocks
from dropforge.data.cache import TokenCache, entry_key, tokenizer_hash
from dropforge.data.column_template import ColumnTemplate, parse
from dropforge.data.convert import other_format
from dropforge.data.detect import Match, detect
from dropforge.data.media import media_columns
from dropforge.data.process import Batch, Counts, Work
from dropforge.data.report import FileReport
from dropforge.data.rows import Row
from dropforge.data.sources import Locate, Part, open_source
from dropforge.data.table import TokenTable
from dropforge.data.workers import Result, RowPool
from dropforge.errors import DataError
from dropforge.spec import ColumnsFormat, SourceSpec, Spec

SAMPLE_ROWS = 100
"""So many rows decide the format."""
Templates = tuple[ColumnTemplate, ColumnTemplate]


@dataclass(kw_only=True)
class Reading:
    """Reads sources into a table and counts what happens on the way."""

    spec: Spec
    pool: RowPool
    locate: Locate
    log: Callable[[str], None]
    cache: TokenCache
    signatures: bool
    files: list[FileReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    parts: list[str] = field(default_factory=list)
    """Names of the files, in the order of the table's part numbers."""

    def read(self, sources: Sequence[SourceSpec], table: TokenTable) -> None:
        for number, source in enumerate(sources):
            for part in open_source(source, locate=self.locate, warn=self._warn):
                self._read_part(part, table, source=number)

    def where(self, table: TokenTable, row: int) -> str:
        """The place a row of the table came from: `tickets.csv:17`."""
        return f"{self.parts[int(table.parts[row])]}:{int(table.numbers[row])}"

    def _read_part(self, part: Part, table: TokenTable, *, source: int) -> None:
        rows = part.rows()
        sample = list(islice(rows, SAMPLE_ROWS))
        if not sample:
            raise DataError(
                f"{part.name} holds no rows", code="data-empty", where=part.name, fix="put at least one row into it"
            )
        match, templates = self._match(sample, part.name)
        self.log(f"{part.name}: format {match.format}, because {match.reason}")
        self._check_overlap()
        work = Work(
            match=match, templates=templates, system=self.spec.data.system,
            everything=self.spec.data.train_on == "everything", length=self.spec.model.max_seq_length,
            overlap=self.spec.data.chunk_overlap, signatures=self.signatures,
            loose=self.signatures or self.spec.data.eval is not None,
        )  # fmt: skip
        number = len(self.parts)
        self.parts.append(part.name)
        counts = Counts()
        blocks = part.lines() if part.lines else row_blocks(chain(sample, rows))
        for batch, more in self._results(part, work, blocks):
            counts.add(more)
            table.add(batch, source=source, part=number)
        self.counts.add(counts)
        self.files.append(
            FileReport(
                path=part.name, sha256=part.sha256, bytes=part.bytes, rows=counts.read,
                format=match.format, format_reason=match.reason,
            )
        )  # fmt: skip

    def _results(self, part: Part, work: Work, blocks: Iterable[Block]) -> Iterator[Result]:
        """From the cache, or made now and kept there."""
        key = entry_key(
            content=part.sha256, rows=f"{part.name} {part.chosen}", work=work,
            tokenizer=tokenizer_hash(self.pool.local.tokenizer),
        )  # fmt: skip
        found = self.cache.load(key)
        if found is not None:
            batches, counts = found
            self.log(f"{part.name}: {counts.read} rows were tokenised by an earlier job")
            yield from _with_counts(batches, counts)
            return
        writer = self.cache.writer(key)
        counts = Counts()
        try:
            for batch, more in self.pool.run(blocks, work):
                counts.add(more)
                if writer is not None:
                    writer.add(batch)
                yield batch, more
        except BaseException:
            if writer is not None:
                writer.discard()
            raise
        if writer is not None:
            writer.finish(counts)

    def _match(self, sample: Sequence[Row], name: str) -> tuple[Match, Templates | None]:
        wanted = self.spec.data.format
        fields = [row.fields for row in sample]
        for column, kind in media_columns(fields).items():
            self._warn(f"{name}: column {column!r} holds {kind}, which training on text does not look at")
        if not isinstance(wanted, ColumnsFormat):
            match = detect(fields, file=name, forced=wanted)
            if wanted == "auto" and any(other_format(row, match) for row in fields):
                match = detect(fields[:1], file=name)  # the first row decides, and the first other one is named
            used = set(match.columns.values())
            unused = sorted({column for row in sample for column in row.fields} - used)
            if unused and match.format != "text":
                self._warn(f"{name}: columns not used: {', '.join(unused[:10])}")
            return match, None
        prompt = _parse(wanted.columns.prompt, "prompt")
        text = wanted.columns.response
        response = _parse(text if "{" in text else "{" + text + "}", "response")
        return Match(format="columns", reason="data.format names the columns"), (prompt, response)

    def _check_overlap(self) -> None:
        overlap, length = self.spec.data.chunk_overlap, self.spec.model.max_seq_length
        if overlap >= length:
            raise DataError(
                "chunks overlap by as much as they are long",
                code="data-overlap",
                where="data.chunk_overlap",
                why=f"{overlap} tokens of {length} (model.max_seq_length)",
                fix=f"set it to {length // 4} or less",
            )

    def _warn(self, text: str) -> None:
        self.warnings.append(text)

    def refuse_empty(self, table: TokenTable) -> None:
        """Nothing trains when nothing is left to learn from."""
        if len(table):
            return
        where, why = self.counts.dropped[0]
        raise DataError(
            f"none of the {self.counts.read} rows has anything to learn",
            code="data-all-masked",
            where=where,
            why="; ".join(f"{count} rows: {reason}" for reason, count in self.counts.reasons.most_common(3)),
            fix="raise model.max_seq_length" if "max_seq_length" in why else "fill in the answers",
        )


def _with_counts(batches: Iterator[Batch], counts: Counts) -> Iterator[Result]:
    """The counts of the whole file go with its first batch."""
    yield from ((batch, more) for batch, more in zip(batches, chain([counts], iter(Counts, None)), strict=False))


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
