"""Tokenised rows, collected batch by batch into Arrow: in memory, or (large sets) in a file that is mapped."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dropforge.data.process import Batch

if TYPE_CHECKING:
    import datasets

Indices = npt.NDArray[np.int64]
MEMORY_TOKENS = 20_000_000
"""Up to so many tokens (160 MB) stay in memory; beyond that a work folder is used if there is one."""
COLUMNS = ("numbers", "digests", "loose", "learnt", "full", "lengths", "sources", "parts")


class TokenTable:
    """Append-only. Beside the rows it keeps a few numbers per row as arrays (about 44 bytes a row)."""

    def __init__(self, *, file: Path | None = None) -> None:
        self._file = file
        self._batches: list[Any] = []
        self._sink: Any = None
        self._writer: Any = None
        self._columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in COLUMNS}
        self._signatures: list[npt.NDArray[np.uint32]] = []
        self._rows = 0
        self._tokens = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, batch: Batch, *, source: int, part: int) -> None:
        """Append rows that came from source number `source` of the spec, and from file number `part`."""
        if not len(batch):
            return
        lengths = np.diff(batch.ends, prepend=0).astype(np.int32)
        values: dict[str, npt.NDArray[Any]] = {
            "numbers": batch.numbers,
            "digests": batch.digests,
            "loose": batch.loose,
            "learnt": batch.learnt,
            "full": batch.full,
            "lengths": lengths,
            "sources": np.full(len(batch), source, dtype=np.int32),
            "parts": np.full(len(batch), part, dtype=np.int32),
        }
        for name, value in values.items():
            self._columns[name].append(value)
        if len(batch.signatures):
            self._signatures.append(batch.signatures)
        self._rows += len(batch)
        self._tokens += len(batch.ids)
        record = arrow_batch(batch)
        if self._writer is None and self._file is not None and self._tokens > MEMORY_TOKENS:
            self._spill(record.schema)
        if self._writer is not None:
            self._writer.write_batch(record)
        else:
            self._batches.append(record)

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
            return datasets.Dataset.from_file(str(self._file)).select(indices, new_fingerprint=self._name(indices))
        table = pa.Table.from_batches(self._batches).take(pa.array(indices)).combine_chunks()
        return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=self._name(indices))

    def _name(self, indices: Indices) -> str:
        """Names the chosen rows by their digests; the library would pickle and hash all of their tokens."""
        return hashlib.blake2b(self.digests[indices].tobytes(), digest_size=16).hexdigest()

    def _column(self, name: str) -> npt.NDArray[Any]:
        chunks = self._columns[name]
        if len(chunks) > 1:
            self._columns[name] = chunks = [np.concatenate(chunks)]
        return chunks[0] if chunks else np.empty(0, dtype=np.int64)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Line or row in its file, per row."""
        return self._column("numbers")

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Equal for rows of equal tokens and labels."""
        return self._column("digests")

    @property
    def loose(self) -> npt.NDArray[np.uint64]:
        """Equal for rows whose letters and digits are equal, whatever their case, blanks and punctuation."""
        return self._column("loose")

    @property
    def sources(self) -> npt.NDArray[np.int32]:
        return self._column("sources")

    @property
    def parts(self) -> npt.NDArray[np.int32]:
        return self._column("parts")

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return self._column("lengths")

    @property
    def full(self) -> npt.NDArray[np.int32]:
        """Tokens before cutting to the maximum length."""
        return self._column("full")

    @property
    def learnt(self) -> npt.NDArray[np.int32]:
        return self._column("learnt")

    @property
    def signatures(self) -> npt.NDArray[np.uint32] | None:
        """(rows, 32), when they were asked for."""
        if not self._signatures:
            return None
        return np.concatenate(self._signatures)


def arrow_batch(batch: Batch) -> Any:
    """The columns input_ids and labels (lists of int32) without copying them."""
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], batch.ends]).astype(np.int32))
    columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (batch.ids, batch.labels)]
    kind = pa.list_(pa.int32())
    return pa.record_batch(columns, schema=pa.schema({"input_ids": kind, "labels": kind}))
