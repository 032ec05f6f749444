"""Base models whose own files are quantised: every matrix back in a 16-bit type, one at a time.

    bitsandbytes 4-bit   through the library's own dequantisation
    int8, FP8            W = q s, with s per matrix, per row, or per block   (bitsandbytes' int8: s = SCB / 127)

Read are the formats of bitsandbytes, transformers' `fp8` and `fbgemm_fp8`, and compressed-tensors' unpacked ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.safetensors_stream import INDEX, read_header, weight_files, write_file
from dropforge.export.tensor_reader import TensorReader
from dropforge.files import read_json, write_json

if TYPE_CHECKING:
    import torch

WEIGHT = ".weight"
SCALES = ("_scale_inv", "_scale")
# Beside a quantised matrix, or for the cache of keys and values; dequantised weights need none of them.
BESIDE = (
    "weight_scale_inv", "weight_scale", "input_scale", "activation_scale", "weight_format", "SCB", "weight_shape",
    "k_scale", "v_scale", "q_scale", "prob_scale",
)  # fmt: skip
PLAIN = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True, kw_only=True)
class QuantizedBase:
    """A quantised model folder that can be read."""

    folder: Path
    label: str
    """The format, for people."""
    error: float
    """RMS of what rounding to this format may cost a matrix, over the RMS of the matrix; a generous bound."""
    shapes: dict[str, tuple[int, ...]]
    """Every tensor the model has in 16 bits."""
    matrices: dict[str, Callable[[], torch.Tensor]]
    """Name of a quantised weight -> that weight as floating point numbers, computed when it is called."""
    reader: TensorReader

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as floating point numbers."""
        return self.matrices[name]() if name in self.matrices else self.reader.whole(name)


def quantized_base(folder: Path) -> QuantizedBase | None:
    """The quantised model in `folder`; None when its files are 16 or 32 bits.

    Raises ExportError (export-base-quantized) when they are in a format that is not read.
    """
    found = read_json(folder / "config.json").get("quantization_config")
    if not found:
        return None
    method = str(found.get("quant_method", "unknown")) if isinstance(found, dict) else "unknown"
    reader = TensorReader(folder)
    if method == "bitsandbytes":
        made = _bitsandbytes(reader)
        label = "bitsandbytes int8" if found.get("load_in_8bit") else f"bitsandbytes {_four_bits(found)}"
        error = 0.03 if found.get("load_in_8bit") else 0.2
    elif method in {"fp8", "fbgemm_fp8", "compressed-tensors"}:
        made = _scaled(reader, block=_block(found))
        label, error = f"{method}, 8 bits", 0.05
    else:
        raise _refused(method, why="this format is not read")
    names = [name for name in reader.names if name in made or not _beside(name, made)]
    strange = [name for name in names if name not in made and reader.label(name) not in PLAIN]
    if strange or not made:
        why = f"it holds {strange[0]} as {reader.label(strange[0])}" if strange else "it holds no matrix in that format"
        raise _refused(method, why=why)
    shapes = {name: made[name][0] if name in made else reader.shape(name) for name in names}
    return QuantizedBase(
        folder=folder, label=label, error=error, shapes=shapes, reader=reader,
        matrices={name: read for name, (_, read) in made.items()},
    )  # fmt: skip


def dequantize(base: QuantizedBase, target: Path) -> str:
    """Write the model into the existing empty folder `target`, file by file; returns the dtype it has there."""
    import torch

    config: dict[str, Any] = read_json(base.folder / "config.json")
    label = str(config.pop("torch_dtype", None) or config.get("dtype") or "bfloat16").removeprefix("torch.")
    label = label if label in {"float16", "bfloat16"} else "bfloat16"
    config.pop("quantization_config")
    write_json(target / "config.json", {**config, "dtype": label})
    dtype: torch.dtype = getattr(torch, label)
    weight_map: dict[str, str] = {}
    for file in weight_files(base.folder):
        shapes = {name: base.shapes[name] for name in read_header(file) if name in base.shapes}
        if shapes:
            write_file(target / file.name, shapes, dtype=dtype, tensor=base.tensor)
            weight_map.update(dict.fromkeys(shapes, file.name))
    if (base.folder / INDEX).exists():
        write_json(target / INDEX, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    return label


Made = dict[str, tuple[tuple[int, ...], Callable[[], "torch.Tensor"]]]
"""Weight name -> its shape [out, in] and how to compute it."""


def _bitsandbytes(reader: TensorReader) -> Made:
    made: Made = {}
    for name in reader.names:
        weight, found, _ = name.partition(".weight.quant_state.bitsandbytes__")
        if found:
            shape = tuple(json.loads(bytes(reader.whole(name).numpy()))["shape"])
            made[weight + WEIGHT] = (shape, partial(_four_bit_matrix, reader, weight + WEIGHT))
        elif name.endswith(".SCB"):
            weight = name.removesuffix(".SCB") + WEIGHT
            made[weight] = (reader.shape(weight), partial(_int8_matrix, reader, weight))
    return made


def _four_bit_matrix(reader: TensorReader, name: str) -> torch.Tensor:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    start = f"{name}."
    parts = {part.removeprefix(start): reader.whole(part) for part in reader.names if part.startswith(start)}
    state = QuantState.from_dict(qs_dict=parts, device=torch.device("cpu"))
    found: torch.Tensor = dequantize_4bit(reader.whole(name), state)
    return found


def _int8_matrix(reader: TensorReader, name: str) -> torch.Tensor:
    scale = reader.whole(name.removesuffix(WEIGHT) + ".SCB").float()
    return reader.whole(name).float() * (scale / 127.0)[:, None]


def _scaled(reader: TensorReader, *, block: tuple[int, int] | None) -> Made:
    made: Made = {}
    for name in reader.names:
        scales = [name + ending for ending in SCALES if name + ending in reader]
        if name.endswith(WEIGHT) and scales:
            if f"{name}_zero_point" in reader:
                raise _refused("compressed-tensors", why=f"{name} has a zero point")
            made[name] = (reader.shape(name), partial(_times_scale, reader, name, scales[0], block))
    return made


def _times_scale(reader: TensorReader, name: str, scale_name: str, block: tuple[int, int] | None) -> torch.Tensor:
    weight, scale = reader.whole(name).float(), reader.whole(scale_name).float()
    rows, columns = weight.shape
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.numel() == rows:
        return weight * scale.reshape(rows, 1)
    if block is None or scale.shape != (-(-rows // block[0]), -(-columns // block[1])):
        raise _refused("its own", why=f"{scale_name} has the shape {tuple(scale.shape)} for {tuple(weight.shape)}")
    spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight * spread


def _block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the configuration says so."""
    groups = config.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    blocks = [config.get("weight_block_size"), *(entry.get("block_structure") for entry in weights)]
    found = next((block for block in blocks if block), None)
    if found:
        return int(found[0]), int(found[1])
    sizes = [int(w["group_size"]) for w in weights if w.get("group_size")]
    return (1, sizes[0]) if sizes else None


def _beside(name: str, made: Made) -> bool:
    """The tensor belongs to a quantised matrix and has no use without its rounding."""
    start, found, _ = name.partition(".weight.")
    return (bool(found) and start + WEIGHT in made) or name.rpartition(".")[2] in BESIDE


def _four_bits(config: dict[str, Any]) -> str:
    return str(config.get("bnb_4bit_quant_type", "nf4"))


def _refused(method: str, *, why: str) -> ExportError:
    return ExportError(
        f"the base model's files are quantised in a format that cannot be read back ({method})",
        code="export-base-quantized", where="config.json: quantization_config", why=why,
        fix="train on the 16-bit model with `model.quantization: nf4`, or export only `adapter`",
    )  # fmt: skip
