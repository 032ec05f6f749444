"""Read tensors of a safetensors folder in pieces, with plain reads: no file stays mapped, so memory is what is held.

A mapped file would count as memory of the process as far as it was touched, which in the end is the whole model.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.errors import ExportError
from dropforge.export.safetensors_stream import read_header, weight_files
from dropforge.models.pictures import stored_names

if TYPE_CHECKING:
    import torch

LABELS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class TensorReader:
    """Every tensor of a model folder by name; what is asked for is read from the file each time."""

    def __init__(self, folder: Path, *, as_loaded: bool = False) -> None:
        """`as_loaded`: under the names that the loaded model has, where those in the files are others."""
        self._places: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for file in weight_files(folder):
            header = read_header(file)
            with file.open("rb") as stream:
                start = 8 + struct.unpack("<Q", stream.read(8))[0]
            for name, entry in header.items():
                self._places[name] = (file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        if as_loaded and (names := stored_names(folder, self._places)):
            self._places = {loaded: self._places[name] for loaded, name in names.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> list[str]:
        return sorted(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][2]

    def label(self, name: str) -> str:
        """safetensors' name of the stored type, such as BF16."""
        return self._places[name][1]

    def whole(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self._read(name, 0, 1).reshape(())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop (along the first dimension) in the stored dtype."""
        shape = self.shape(name)
        width = 1
        for extent in shape[1:]:
            width *= extent
        return self._read(name, start * width, (stop - start) * width).reshape(stop - start, *shape[1:])

    def _read(self, name: str, first: int, count: int) -> torch.Tensor:
        import torch

        file, label, _, offset = self._places[name]
        dtype: torch.dtype = getattr(torch, LABELS[label])
        data = bytearray(count * dtype.itemsize)
        if not data:
            return torch.empty(0, dtype=dtype)
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset + first * dtype.itemsize)
            view, done = memoryview(data), 0
            while done < len(data):
                got = stream.readinto(view[done:])
                if not got:
                    raise ExportError(f"{file.name} is cut short", code="export-weights-broken", where=name)
                done += got
        return torch.frombuffer(data, dtype=dtype)
