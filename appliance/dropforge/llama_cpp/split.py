"""Cut a GGUF into files of at most so many bytes, as llama.cpp's gguf-split does; llama.cpp loads them by the first.

Each part is a GGUF of its own with three more values: split.no, split.count and split.tensors.count. The first holds
all other metadata. Tensor bytes are copied as they are. File format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dropforge.errors import ExportError

UINT16, INT32 = 2, 5
PIECE = 16 * 2**20


def part_name(stem: str, number: int, count: int) -> str:
    """llama.cpp's name of part `number`, from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def split_gguf(source: Path, folder: Path, *, stem: str, largest: int) -> list[Path]:
    """Write the parts of `source` into `folder`; a tensor larger than `largest` gets a part of its own."""
    import gguf

    reader = gguf.GGUFReader(source)
    groups = _groups(reader.tensors, largest)
    with source.open("rb") as stream:
        stream.seek(24)
        metadata = stream.read(reader.tensors[0].field.offset - 24)
        paths = []
        for number, tensors in enumerate(groups):
            path = folder / part_name(stem, number + 1, len(groups))
            extra = [("split.no", UINT16, number), ("split.count", UINT16, len(groups))]
            extra.append(("split.tensors.count", INT32, len(reader.tensors)))
            known = len(reader.fields) - 3 if number == 0 else 0  # the reader counts the header's three numbers
            _write(
                path, stream, tensors, metadata=metadata if number == 0 else b"", known=known, extra=extra,
                alignment=reader.alignment,
            )  # fmt: skip
            paths.append(path)
    return paths


def compare_parts(source: Path, parts: list[Path]) -> int:
    """Every tensor of `source` must be in exactly one part, byte for byte; returns how many there are."""
    left = dict(_hashes(source))
    total = len(left)
    for part in parts:
        for name, found in _hashes(part):
            if left.pop(name, None) != found:
                raise _wrong(f"{name} in {part.name}")
    if left:
        raise _wrong(f"missing: {', '.join(sorted(left)[:5])}")
    return total


def _groups(tensors: list[Any], largest: int) -> list[list[Any]]:
    groups: list[list[Any]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.n_bytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += int(tensor.n_bytes)
    return groups


def _write(
    path: Path, source: BinaryIO, tensors: list[Any], *, metadata: bytes, known: int, extra: list[tuple[str, int, int]],
    alignment: int,
) -> None:  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), known + len(extra)) + metadata
    for key, kind, value in extra:
        text = key.encode()
        head += struct.pack("<Q", len(text)) + text + struct.pack("<I", kind)
        head += struct.pack("<H" if kind == UINT16 else "<i", value)
    offset = 0
    for tensor in tensors:
        text = tensor.name.encode()
        head += struct.pack("<Q", len(text)) + text + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}QIQ", *map(int, tensor.shape), int(tensor.tensor_type), offset)
        offset += _padded(int(tensor.n_bytes), alignment)
    with path.open("wb") as target:
        target.write(head + bytes(_padded(len(head), alignment) - len(head)))
        for tensor in tensors:
            for piece in _pieces(source, int(tensor.data_offset), int(tensor.n_bytes)):
                target.write(piece)
            target.write(bytes(_padded(int(tensor.n_bytes), alignment) - int(tensor.n_bytes)))


def _hashes(path: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    import gguf

    with path.open("rb") as stream:
        for tensor in gguf.GGUFReader(path).tensors:
            digest = hashlib.sha256()
            for piece in _pieces(stream, int(tensor.data_offset), int(tensor.n_bytes)):
                digest.update(piece)
            yield tensor.name, (int(tensor.tensor_type), tuple(map(int, tensor.shape)), digest.digest())


def _pieces(stream: BinaryIO, start: int, count: int) -> Iterator[bytes]:
    stream.seek(start)
    while count:
        piece = stream.read(min(count, PIECE))
        if not piece:
            raise _wrong("the file is cut short")
        count -= len(piece)
        yield piece


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _wrong(why: str) -> ExportError:
    return ExportError("the parts do not hold the whole GGUF", code="gguf-split", where="gguf", why=why)
