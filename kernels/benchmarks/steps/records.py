"""One row per engine, shape and process, appended to the CSV as soon as it is there: a cut-off run keeps its rows."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

COLUMNS = (
    "kind", "model", "layers", "engine", "setting", "weights", "batch", "length", "card_gib", "status", "tok_per_s",
    "step_ms", "step_ms_p20", "step_ms_p80", "steps", "host_ms", "enqueue_ms", "peak_allocated_gib",
    "peak_reserved_gib", "first_step_gib", "driver_gib", "predicted_gib", "host_store_gib", "memory_plan", "loss",
    "grad_norm", "parity", "optimizer", "gpu", "torch", "triton", "transformers", "peft", "bitsandbytes", "peer",
    "commit", "round", "time",
)  # fmt: skip
"""kind: step or longest. tok_per_s: batch x length over the median step. step_ms: forward, backward and optimizer.
host_ms: the same step with 64 tokens, where the GPU has next to nothing to do: the launches alone. enqueue_ms: until
the host had queued a full-size step. loss, grad_norm: of the first step, before any update (kind longest: after a
step of 64 tokens). *_gib: GiB of 2^30 bytes;
peaks after the warm-up, first_step_gib in the warm-up's first step; driver_gib: used on the card, context included."""


def append(path: Path, row: Mapping[str, object]) -> None:
    """Adds one row; writes the header into a new file. Raises KeyError for a column that is not in the list."""
    unknown = [key for key in row if key not in COLUMNS]
    if unknown:
        raise KeyError(f"not a column: {unknown[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({key: _text(value) for key, value in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    """All rows, every value as text."""
    with path.open() as file:
        return list(csv.DictReader(file))


def _text(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value
