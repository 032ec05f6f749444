"""What can be known about a model and its data without loading either: sizes, from headers and configs. No torch."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dropforge_kernels.modules.model_shape import ModelShape, model_shape

from dropforge.errors import DataError
from dropforge.locate import Locate
from dropforge.paths import DataRoot
from dropforge.spec import DataSpec, ModelSpec

LINE_FORMATS = {".jsonl", ".csv", ".tsv"}
WHOLE_FORMATS = {".json", ".xlsx", ".parquet", ".txt", ".md"}
TOWER = re.compile(r"(^|\.)(vision|visual|image|multi_modal|audio)")
"""Starts of path parts of what reads pictures or sounds; text trains nothing there."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Numbers of a model; None where nothing on this machine tells. `source` says where they come from."""

    parameters: int | None
    linear_shapes: tuple[tuple[int, int], ...] = ()
    """(out_features, in_features) of every weight matrix inside the decoder layers; what LoRA attaches to."""
    embedding_shape: tuple[int, int] | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    shape: ModelShape | None = None
    """What the memory planner needs; None where the engine's layers do not run: models that are not decoders with a
    gated MLP, or that read pictures too."""
    on_disk: bool = False
    source: str


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """`rows` is None when the format must be read to be counted."""

    rows: int | None
    bytes: int
    missing: tuple[str, ...]


def safetensors_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of every *.safetensors file in `folder`, read from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def model_facts(model: ModelSpec, *, folder: Path | None) -> ModelFacts:
    """Facts from the model's folder when it is on this machine, else from its name, else none.

    Args:
        folder: where the model's files lie, or None when they are not here yet.
    """
    if folder is None:
        return _from_name(model.id)
    shapes = safetensors_shapes(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pictures = "vision_config" in config
    text = {**config, **(config.get("text_config") or {})}
    trained = {name: shape for name, shape in shapes.items() if not (pictures and TOWER.search(name))}
    linear = [s for n, s in trained.items() if len(s) == 2 and ".layers." in n and n.endswith(".weight")]
    embedding = next((s for n, s in shapes.items() if n.endswith("embed_tokens.weight")), None)
    return ModelFacts(
        parameters=sum(prod(shape) for shape in shapes.values()),
        linear_shapes=tuple((s[0], s[1]) for s in linear),
        embedding_shape=(embedding[0], embedding[1]) if embedding else None,
        hidden_size=text.get("hidden_size"),
        num_layers=text.get("num_hidden_layers"),
        shape=None if pictures else _shape(config),
        on_disk=True,
        source="the model's files",
    )


def _shape(config: dict[str, Any]) -> ModelShape | None:
    try:
        return model_shape(config)
    except ValueError:
        return None


def local_model_folder(model: ModelSpec, root: DataRoot) -> Path | None:
    """The folder of a model that is here already, without building or downloading anything."""
    from dropforge.models.builtin import builtin_folder

    if model.id.startswith("builtin:"):
        folder = builtin_folder(model.id)
        return folder if folder and (folder / "config.json").exists() else None
    folder = root.models / model.id
    return folder if (folder / "config.json").exists() else None


def _from_name(model_id: str) -> ModelFacts:
    match = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z])", model_id.replace("-", " ").replace("_", " "))
    if match is None:
        return ModelFacts(parameters=None, source="unknown: the model is not on this machine yet")
    scale = 1e9 if match[2] in "bB" else 1e6
    return ModelFacts(parameters=int(float(match[1]) * scale), source="guessed from the model's name")


def data_facts(data: DataSpec, locate: Locate) -> DataFacts:
    """Bytes and, for line formats, rows of the training data; missing files are named, not raised."""
    rows: int | None = 0
    size, missing = 0, []
    for source in data.train:
        try:
            path = locate(source.path)
        except DataError:
            missing.append(source.path)
            rows = None
            continue
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
        size += sum(file.stat().st_size for file in files)
        counts = [_count_rows(file) for file in files]
        rows = None if rows is None or None in counts else rows + round(sum(c or 0 for c in counts) * source.weight)
    return DataFacts(rows=rows, bytes=size, missing=tuple(missing))


def _count_rows(path: Path) -> int | None:
    """Lines of a line format (one less for a CSV header): exact unless a quoted CSV cell holds a newline."""
    if path.suffix.lower() not in LINE_FORMATS:
        return None
    lines = 0
    with path.open("rb") as stream:
        last = b"\n"
        while block := stream.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    lines += last != b"\n"
    return max(lines - 1, 0) if path.suffix.lower() != ".jsonl" else lines
