"""Small results files beside the whole-step CSV, each written by one command."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch


def write_rows(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]], *, device: str, commit: str
) -> None:
    """Writes ``rows`` as they come, with the machine's columns, and prints each. Replaces the file."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    machine = {"gpu": gpu, "torch": torch.__version__.partition("+")[0], "commit": commit}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(cells | machine)
            file.flush()
            print(" ".join(f"{key}={value}" for key, value in cells.items()), flush=True)
