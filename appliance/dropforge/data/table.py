"""Tokenised rows, collected batch by batch into Arrow: in memory, or (large sets) in a file that is mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dropforge.data.tokenize import Tokens

if TYPE_CHECKING:
    import datasets

Indices = npt.NDArray[np.int64]
MEMORY_TOKENS = 20_000_000
"""Up to so many tokens (160 MB) stay in memory; beyond that a work folder is used if there is one."""


class TokenTable:
    """Append-only. Beside the rows it keeps, per row, a digest, the source and two counts as small integers."""

    def __init__(self, *, file: Path | None = None) -> None:
        self._file = file
        self._batches: list[Any] = []
        self._sink: Any = None
        self._writer: Any = None
        self._digests: list[int] = []
        self._sources: list[int] = []
        self._lengths: list[int] = []
        self._learnt: list[int] = []
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, rows: Sequence[Tokens], *, source: int) -> None:
        """Append rows that came from source number `source` of the spec."""
        import hashlib

        import pyarrow as pa

        if not rows:
            return
        for row in rows:
            content = np.asarray([row.input_ids, row.labels], dtype=np.int32).tobytes()
            self._digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))
            self._sources.append(source)
            self._lengths.append(len(row.input_ids))
            self._learnt.append(row.learnt)
            self._tokens += len(row.input_ids)
        column = pa.list_(pa.int32())
        batch = pa.record_batch(
            [pa.array([row.input_ids for row in rows], column), pa.array([row.labels for row in rows], column)],
            schema=pa.schema({"input_ids": column, "labels": column}),
        )
        if self._writer is None and self._file is not None and self._tokens > MEMORY_TOKENS:
            self._spill(batch.schema)
        if self._writer is not None:
            self._writer.write_batch(batch)
        else:
            self._batches.append(batch)

    def _spill(self, schema: Any) -> None:
        import pyarrow as pa

        self._sink = pa.OSFile(str(self._file), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema)
        for batch in self._batches:
            self._writer.write_batch(batch)
        self._batches = []

    def dataset(self, indices: Indices) -> datasets.Dataset:
        """The rows `indices`, in this order, repetitions allowed. Call it when all rows are in."""
        import datasets
        import pyarrow as pa

        if self._sink is not None:
            if not self._sink.closed:
                self._writer.close()
                self._sink.close()
            return datasets.Dataset.from_file(str(self._file)).select(indices)
        table = pa.Table.from_batches(self._batches).take(pa.array(indices)).combine_chunks()
        return datasets.Dataset(datasets.table.InMemoryTable(table))

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        return np.asarray(self._digests, dtype=np.uint64)

    @property
    def sources(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._sources, dtype=np.int64)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._lengths, dtype=np.int64)

    @property
    def learnt(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._learnt, dtype=np.int64)
