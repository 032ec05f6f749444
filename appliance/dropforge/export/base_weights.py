"""The 16-bit weights an adapter is merged onto: the base model's own files; for a quantised base those of the original,
when it is at hand and proves to be it, else the dequantised ones. Which it was stands in every report.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropforge.errors import DropforgeError
from dropforge.export.quantized_base import QuantizedBase, dequantize, quantized_base
from dropforge.export.safetensors_stream import INDEX, index_folder
from dropforge.export.tensor_reader import TensorReader
from dropforge.files import read_json
from dropforge.models.source import resolve_model
from dropforge.paths import DataRoot
from dropforge.spec import ModelSpec

QUANTIZED_NAME = re.compile(
    r"[-_.](unsloth|bnb|nf4|fp4|4bit|8bit|int8|fp8|dynamic|block|static|w8a8|quantized)$", re.IGNORECASE
)
BASE_MODEL = re.compile(r"^base_model: *[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)
KEPT_ERROR = 0.01
"""Tensors that were not quantised are the original's, up to one rounding to 16 bits."""


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """Where the 16-bit weights are, and what is to be said about them."""

    folder: Path
    note: dict[str, Any] = field(default_factory=dict)
    """Empty when the base model's own files are 16 or 32 bits."""


def base_weights(base: Path, *, originals: Iterable[Path], work: Path, log: Callable[[str], None]) -> BaseWeights:
    """`originals` are folders that may hold the 16-bit model; `work` gets the dequantised one, made anew.

    Raises ExportError (export-base-quantized) for a format that is not read, and the codes of safetensors_stream.
    """
    found = quantized_base(base)
    if found is None:
        return BaseWeights(folder=base)
    for folder in originals:
        error = _distance(found, folder)
        if error is not None and error <= found.error:
            log(f"the base model is {found.label}; merging onto its original 16-bit weights")
            note = {"format": found.label, "weights": "original", "worst_distance": round(error, 5)}
            return BaseWeights(folder=folder, note=note)
    log(f"the base model is {found.label} and its original is not at hand; dequantising it")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    label = dequantize(found, work)
    made = {path.name for path in work.iterdir()} | {INDEX}
    for path in base.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in made:
            shutil.copyfile(path, work / path.name)
    note = {"format": found.label, "weights": "dequantised", "dtype": label, "matrices": len(found.matrices)}
    return BaseWeights(folder=work, note=note)


def original_folders(model_id: str, *, base: Path, root: DataRoot) -> tuple[Path, ...]:
    """Folders on this machine that may hold the 16-bit model of a quantised one; nothing is fetched."""
    if not read_json(base / "config.json").get("quantization_config"):
        return ()
    names = [_plain_name(model_id)]
    readme = base / "README.md"
    said = BASE_MODEL.search(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    names += [said[1], said[1].rpartition("/")[2]] if said else []
    names.append(_plain_name(model_id.rpartition("/")[2]))
    folders = []
    for name in dict.fromkeys(names):
        if name == model_id:
            continue
        try:
            folders.append(resolve_model(ModelSpec(id=name), root=root, offline=True).path)
        except (DropforgeError, ValueError):
            continue
    return tuple(folders)


def _plain_name(model_id: str) -> str:
    """The id without the endings that say how it was quantised."""
    while (shorter := QUANTIZED_NAME.sub("", model_id)) != model_id:
        model_id = shorter
    return model_id


def _distance(base: QuantizedBase, folder: Path) -> float | None:
    """The largest relative distance of a matrix from that in `folder`; None when it is another model."""
    try:
        stored = index_folder(folder)
        if read_json(folder / "config.json").get("quantization_config"):
            return None
    except (DropforgeError, OSError, ValueError):
        return None
    if {name: info.shape for name, info in stored.items()} != base.shapes:
        return None
    reader = TensorReader(folder)
    kept = [name for name in sorted(base.shapes) if name not in base.matrices]
    if any(_relative(base, reader, name) > KEPT_ERROR for name in kept):
        return None
    return max(_relative(base, reader, name) for name in base.matrices)


def _relative(base: QuantizedBase, reader: TensorReader, name: str) -> float:
    mine, other = base.tensor(name).float(), reader.whole(name).float()
    size = float(other.norm())
    return float((mine - other).norm()) / size if size else float(bool(mine.any()))
