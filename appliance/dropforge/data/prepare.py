"""From the spec's data section to token rows with labels: read, tokenise, drop duplicates, split, weigh, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dropforge.data.cache import TokenCache
from dropforge.data.mixture import overlap, split, weighted, without_duplicates
from dropforge.data.reading import Reading
from dropforge.data.report import DataReport
from dropforge.data.report_rows import ReportInputs, build_report
from dropforge.data.sources import Locate
from dropforge.data.table import Indices, TokenTable
from dropforge.data.workers import RowPool, worker_count
from dropforge.errors import DataError
from dropforge.spec import Spec

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

NAMED = 20
"""So many rows are named one by one."""


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
    cache: Path | None = None,
    workers: int | None = None,
) -> PreparedData:
    """Read and tokenise everything the spec names. The same spec, files and tokenizer give the same rows.

    Args:
        spec: a resolved spec; uses `data`, `model.max_seq_length` and `train.seed`.
        tokenizer: from `load_tokenizer`, with a chat template.
        locate: gives the safe path of a name in the spec, or raises DataError data-missing.
        log: takes one sentence per thing worth telling.
        work: folder for large sets, which are then mapped from disk instead of held in memory.
        cache: folder where tokenised files are kept for later jobs.
        workers: processes that tokenise large files; default: by CPUs and free memory.

    Raises DataError with file and row for everything that cannot be understood, and when nothing is left to learn.
    """
    warnings: list[str] = []
    with RowPool(tokenizer, workers=_workers() if workers is None else workers, warn=warnings.append) as pool:
        return _Preparation(
            spec=spec, pool=pool, locate=locate, log=log, work=work, cache=TokenCache(cache), warnings=warnings
        ).run()


def _workers() -> int:
    import psutil

    affinity = psutil.Process().cpu_affinity() or [0]
    return worker_count(len(affinity), free_bytes=psutil.virtual_memory().available)


@dataclass(kw_only=True)
class _Preparation:
    """One call of prepare_data."""

    spec: Spec
    pool: RowPool
    locate: Locate
    log: Callable[[str], None]
    work: Path | None
    cache: TokenCache
    warnings: list[str]

    def run(self) -> PreparedData:
        data, seed = self.spec.data, self.spec.train.seed
        reading, table = self._reading(), self._table("train")
        reading.read(data.train, table)
        reading.refuse_empty(table)
        rows = np.arange(len(table), dtype=np.int64)
        if data.deduplicate != "none":
            rows = without_duplicates(table, near=data.deduplicate == "near")
        duplicates = len(table) - len(rows)
        evaluation, eval_rows = None, 0
        contaminated: list[tuple[str, str]] = []
        if data.eval and data.eval.fraction:
            rows, held_out = split(table, fraction=data.eval.fraction, seed=seed, rows=rows)
            evaluation, eval_rows = (table.dataset(held_out), len(held_out)) if len(held_out) else (None, 0)
        elif data.eval:
            other, eval_table = self._reading(), self._table("eval")
            other.read(data.eval.sources, eval_table)
            other.refuse_empty(eval_table)
            everything = np.arange(len(eval_table), dtype=np.int64)
            evaluation, eval_rows = eval_table.dataset(everything), len(eval_table)
            rows, contaminated = self._contamination(reading, table, other, eval_table, rows)
            self.warnings += other.warnings
        weights = [source.weight for source in data.train]
        train = weighted(rows, sources=table.sources, weights=weights, seed=seed, mixing=data.mixing)
        dataset = table.dataset(train)
        report = build_report(
            ReportInputs(
                spec=self.spec, tokenizer=self.pool.local.tokenizer, reading=reading, table=table, train=train,
                dataset=dataset, eval_rows=eval_rows, duplicates=duplicates, contaminated=contaminated,
                warnings=self.warnings, end_of_turn=self._end_of_turn(reading),
            )
        )  # fmt: skip
        for warning in report.warnings:
            self.log(f"warning: {warning}")
        return PreparedData(train=dataset, eval=evaluation, report=report)

    def _reading(self) -> Reading:
        return Reading(
            spec=self.spec, pool=self.pool, locate=self.locate, log=self.log, cache=self.cache,
            signatures=self.spec.data.deduplicate == "near",
        )  # fmt: skip

    def _table(self, name: str) -> TokenTable:
        return TokenTable(file=self.work / f"{name}.arrow" if self.work else None)

    def _end_of_turn(self, reading: Reading) -> str | None:
        """None when there are no conversations, whose template then does not matter."""
        return self.pool.local.renderer.end_of_turn if reading.counts.roles else None

    def _contamination(
        self, reading: Reading, table: TokenTable, other: Reading, eval_table: TokenTable, rows: Indices
    ) -> tuple[Indices, list[tuple[str, str]]]:
        """What data.contamination says about training rows that are evaluation rows too."""
        found = overlap(table, eval_table)
        named = [(reading.where(table, one), other.where(eval_table, two)) for one, two in found]
        if found and self.spec.data.contamination == "fail":
            raise DataError(
                f"{len(found)} training rows stand in the evaluation data too",
                code="data-contaminated",
                where=named[0][0],
                why=f"it says what {named[0][1]} says, so the evaluation would measure what was learnt by heart",
                fix="remove these rows, or set data.contamination: remove",
            )
        if found and self.spec.data.contamination == "remove":
            rows = np.setdiff1d(rows, np.asarray([one for one, _ in found], dtype=np.int64))
            if not len(rows):
                raise DataError(
                    "every training row stands in the evaluation data too", code="data-contaminated",
                    where=named[0][0], fix="give other evaluation data, or data.eval: {fraction: 0.05}",
                )  # fmt: skip
        return rows, named
