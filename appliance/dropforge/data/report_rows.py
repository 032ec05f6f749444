"""The report of prepared rows: numbers, examples and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dropforge.data.lengths import histogram, packing, suggested_length
from dropforge.data.reading import Reading
from dropforge.data.report import FIRST_DROPPED, DataReport
from dropforge.data.table import Indices, TokenTable
from dropforge.data.tokenize import IGNORED
from dropforge.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW_ROWS = 100
GOOD_ROWS = 1000
EXAMPLES = 3
EXAMPLE_TOKENS = 400


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What was prepared. `end_of_turn` None: there are no conversations."""

    spec: Spec
    tokenizer: PreTrainedTokenizerBase
    reading: Reading
    table: TokenTable
    train: Indices
    dataset: Any
    eval_rows: int
    duplicates: int
    contaminated: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    end_of_turn: str | None


def build_report(inputs: ReportInputs) -> DataReport:
    """Counts over the training rows; see DataReport's fields."""
    reading, counts, table, train = inputs.reading, inputs.reading.counts, inputs.table, inputs.train
    lengths, full = table.lengths[train], table.full[train]
    formats = dict.fromkeys(file.format for file in reading.files)
    system = counts.systems[0] if len(counts.systems) == 1 else None
    guessed = counts.languages.total()
    return DataReport(
        files=tuple(reading.files),
        format=" + ".join(formats),
        format_reason="; ".join(dict.fromkeys(file.format_reason for file in reading.files)),
        rows_read=counts.read,
        rows=len(train),
        eval_rows=inputs.eval_rows,
        rows_dropped=counts.reasons.total(),
        dropped=tuple(counts.dropped[:FIRST_DROPPED]),
        dropped_reasons=dict(counts.reasons.most_common()),
        truncated=counts.truncated,
        tokens=int(lengths.sum(dtype=np.int64)),
        trained_tokens=int(table.learnt[train].sum(dtype=np.int64)),
        longest=int(lengths.max()),
        end_of_turn=inputs.end_of_turn or "",
        system=system,
        warnings=(*reading.warnings, *inputs.warnings, *_warnings(inputs)),
        mean_length=float(lengths.mean()),
        histogram=tuple(histogram(full)),
        packing=tuple(packing(full)),
        suggested_length=suggested_length(full),
        roles=dict(counts.roles.most_common()),
        languages={name: count / guessed for name, count in counts.languages.most_common(5)},
        sources=tuple(_sources(inputs)),
        duplicates=inputs.duplicates,
        contaminated=tuple(inputs.contaminated[:FIRST_DROPPED]),
        contaminated_rows=len(inputs.contaminated),
        examples=tuple(example(inputs.tokenizer, row) for row in _first(inputs)),
        train_on=inputs.spec.data.train_on,
    )


def example(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]], *, tokens: int = EXAMPLE_TOKENS
) -> tuple[tuple[str, bool], ...]:
    """The first `tokens` tokens of a row as (text, is it learnt), in turn; ` [...]` behind them: it goes on."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in list(zip(row["input_ids"], row["labels"], strict=True))[:tokens]:
        learnt = label != IGNORED
        if pieces and pieces[-1][1] == learnt:
            pieces[-1][0].append(token)
        else:
            pieces.append(([token], learnt))
    cut = ((" [...]", False),) if len(row["input_ids"]) > tokens else ()
    return (*((str(tokenizer.decode(ids)), learnt) for ids, learnt in pieces), *cut)


def _first(inputs: ReportInputs) -> Iterator[dict[str, list[int]]]:
    """The first row of every source, then further ones, EXAMPLES in all."""
    sources = inputs.table.sources[inputs.train]
    _, firsts = np.unique(sources, return_index=True)
    wanted = dict.fromkeys([*sorted(int(row) for row in firsts), *range(EXAMPLES)])
    for row in list(wanted)[:EXAMPLES]:
        if row < len(inputs.train):
            yield inputs.dataset[row]


def _sources(inputs: ReportInputs) -> Iterator[tuple[str, float, int, int]]:
    before = Counter(inputs.table.sources.tolist())
    after = Counter(inputs.table.sources[inputs.train].tolist())
    for number, source in enumerate(inputs.spec.data.train):
        yield source.path, source.weight, before[number], after[number]


def _warnings(inputs: ReportInputs) -> Iterator[str]:
    counts, spec, rows = inputs.reading.counts, inputs.spec, len(inputs.train)
    if counts.reasons:
        where, why = counts.dropped[0]
        yield f"{_count(counts.reasons.total())} dropped, the first is {where}: {why}"
    if counts.truncated:
        named = ", ".join(counts.truncated_where[:3])
        length = spec.model.max_seq_length
        yield f"{_count(counts.truncated)} cut to {length} tokens (model.max_seq_length), such as {named}"
    if counts.repeated_roles:
        named = ", ".join(counts.repeated_where[:5])
        yield f"{_count(counts.repeated_roles)} with two turns of the same role one after the other, such as {named}"
    if counts.rewritten:
        yield f"the chat template rewrote contents of {_count(counts.rewritten)}, such as splitting off reasoning"
    if inputs.end_of_turn == "":
        yield "the chat template ends an answer without a special token, so the model will not learn when to stop"
    if inputs.duplicates:
        yield f"{_count(inputs.duplicates)} dropped as repetitions (data.deduplicate)"
    if inputs.contaminated:
        first = inputs.contaminated[0]
        done = "were removed" if spec.data.contamination == "remove" else "make the evaluation too good"
        yield f"{len(inputs.contaminated)} training rows are evaluation rows too ({first[0]} is {first[1]}) and {done}"
    if rows < FEW_ROWS:
        yield f"only {_count(rows)} to train on; a few hundred good ones usually do much better"
    elif rows < GOOD_ROWS:
        yield f"{rows} rows to train on are enough to begin with; 1,000 and more usually do better"


def _count(rows: int) -> str:
    return f"{rows:,} row" if rows == 1 else f"{rows:,} rows"
