"""Read and write safetensors folders one tensor at a time, so that memory is bounded by the largest tensor.

File format (safetensors README): 8 bytes little-endian header length, a JSON header with dtype, shape and byte range of
each tensor, then the raw bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.files import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_ROOM = 256
"""Bytes kept free in a header for each tensor beside its name; an entry needs about 100."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Header entry of one tensor."""

    file: Path
    dtype: str
    """safetensors name: F32, F16, BF16 ..."""
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of one file. Raises ExportError (export-weights-broken) when it is not safetensors."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
    except (struct.error, ValueError, MemoryError) as error:
        raise ExportError(
            f"{file.name} is not a whole safetensors file",
            code="export-weights-broken",
            where=file.name,
            why=str(error),
        ) from error
    header.pop("__metadata__", None)
    return header


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder in a fixed order. Raises ExportError (export-weights-missing)."""
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    else:
        names = [SINGLE]
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ExportError(
            "the base model's 16-bit weights are not complete",
            code="export-weights-missing",
            where=", ".join(missing),
            fix="download the base model again",
        )
    return files


def index_folder(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder by name."""
    return {
        name: TensorInfo(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
        for file in weight_files(folder)
        for name, entry in read_header(file).items()
    }


def read_tensor(info: TensorInfo, name: str) -> torch.Tensor:
    """One tensor, in its stored dtype, on the CPU."""
    from safetensors import safe_open

    with safe_open(info.file, framework="pt", device="cpu") as stored:
        return stored.get_tensor(name)


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, tensor: Callable[[str], torch.Tensor]
) -> None:
    """Write one file: `tensor(name)` is asked for one tensor after the other, in name order.

    `shapes` gives every tensor's shape beforehand, because the header comes first; all have the same `dtype`.
    """
    import torch

    label, size = {torch.float32: ("F32", 4), torch.float16: ("F16", 2), torch.bfloat16: ("BF16", 2)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(shapes):
        count = size
        for extent in shapes[name]:
            count *= extent
        header[name] = {"dtype": label, "shape": list(shapes[name]), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(shapes):
            value = tensor(name)
            assert tuple(value.shape) == shapes[name], f"{name} has another shape than announced"
            stream.write(value.to(dtype).contiguous().view(torch.uint8).numpy().data)


def write_stream(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, names: Iterable[str]) -> None:
    """Write one file of tensors of any dtype in the order they come; their shapes need not be known beforehand.

    `names` holds at least the names that will come: it decides how much room is left for the header, which is written
    last and padded with spaces, as the format allows. Tensors whose size is no multiple of 8 bytes come at the end,
    wide elements first, so that every tensor begins where its element type may begin.
    """
    import torch

    labels = {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
        torch.uint8: "U8",
    }  # fmt: skip
    room = 64 + sum(len(name.encode()) + HEADER_ROOM for name in names)
    room += -room % 8
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    late: list[tuple[str, torch.Tensor]] = []
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", room) + b" " * room)

        def put(name: str, value: torch.Tensor) -> None:
            start = stream.tell() - room - 8
            stream.write(value.contiguous().view(torch.uint8).numpy().data)
            header[name] = {
                "dtype": labels[value.dtype], "shape": list(value.shape),
                "data_offsets": [start, stream.tell() - room - 8],
            }  # fmt: skip

        for name, value in tensors:
            if value.nbytes % 8:
                late.append((name, value))
            else:
                put(name, value)
        for name, value in sorted(late, key=lambda item: -item[1].element_size()):
            put(name, value)
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= room, "the header is longer than announced"
        stream.seek(8)
        stream.write(text)


def iterate(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model folder, one after the other."""
    for name, info in sorted(index_folder(folder).items()):
        yield name, read_tensor(info, name)
