"""A tokenised data set as flat arrays: one look at the whole, then constant-time access to each document."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
SLICE = 8192
"""Rows read at a time, so that a large data set is never in memory as Python lists."""


@dataclass(frozen=True)
class TokenRows:
    """Documents end to end.

    Args:
        input_ids: (tokens,) int32.
        targets: (tokens,) int32: the token that each position predicts, IGNORED where nothing is learnt; the last
            position of a document predicts nothing.
        starts: (documents + 1,) int64.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) tokens of each."""
        return np.diff(self.starts)

    @property
    def counted(self) -> np.ndarray:
        """(documents,) targets of each that count in the loss."""
        total = np.concatenate(([0], np.cumsum(self.targets != IGNORED)))
        return total[self.starts[1:]] - total[self.starts[:-1]]

    def fingerprint(self) -> str:
        """Changes when any length, token or target does: a resumed run must see the same."""
        digest = hashlib.sha256(self.starts.tobytes())
        digest.update(self.input_ids.tobytes())
        digest.update(self.targets.tobytes())
        return digest.hexdigest()[:16]


def token_rows(dataset: Dataset) -> TokenRows:
    """Read the columns input_ids and, where there is one, labels (not shifted; otherwise every token is learnt).

    A column seq_lengths (TRL's packing) cuts a row into its documents.
    """
    names = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    columns: Any = dataset.select_columns(names).with_format("arrow")
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for start in range(0, len(dataset), SLICE):
        table = columns[start : start + SLICE]
        rows, values = _flat(table.column("input_ids"))
        ids.append(values)
        labels.append(_flat(table.column("labels"))[1] if "labels" in names else values)
        lengths.append(_flat(table.column("seq_lengths"))[1] if "seq_lengths" in names else rows)
    return from_flat(_joined(ids), _joined(labels), _joined(lengths))


def from_flat(input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> TokenRows:
    """Documents of these lengths, end to end, with labels that stand under their own tokens; empty ones are left out.

    Raises ValueError when the three do not belong together.
    """
    if not len(input_ids) == len(labels) == int(lengths.sum()):
        raise ValueError(f"{len(input_ids)} tokens, {len(labels)} labels and lengths of {int(lengths.sum())} in all")
    starts = np.concatenate(([0], np.cumsum(lengths[lengths > 0], dtype=np.int64)))
    targets = np.full(len(labels), IGNORED, dtype=np.int32)
    targets[:-1] = labels[1:]
    targets[starts[1:] - 1] = IGNORED
    return TokenRows(input_ids.astype(np.int32, copy=False), targets, starts)


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """(lengths of the rows, values end to end) of a list column."""
    joined = column.combine_chunks()
    lengths = joined.value_lengths().to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), joined.flatten().to_numpy(zero_copy_only=False).astype(np.int32)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
