"""A user's own importance matrix (the spec's `imatrix`): read, and compared with the model before the training.

Two file formats, both llama.cpp's (tools/imatrix): a GGUF with NAME.in_sum2 [in, experts] and NAME.counts, and the
older one of plain numbers: how many entries, then for each its name, a count of calls, how many values, the values.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dropforge.errors import ExportError
from dropforge.files import read_json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float32]]

LAYER = re.compile(r"blk\.(\d+)\.")
FEEDS = {"attn_q": "hidden_size", "attn_qkv": "hidden_size", "ffn_up": "hidden_size", "ffn_down": "intermediate_size"}
"""Matrices whose input width follows from the model's configuration."""
LONGEST_NAME = 256


def check_imatrix(path: Path, *, base: Path) -> None:
    """Raise ExportError (export-imatrix) unless `path` is an importance matrix of a model shaped as that in `base`."""
    import numpy as np

    entries = read_imatrix(path)
    broken = sorted(name for name, value in entries.items() if not np.isfinite(value).all() or (value < 0).any())
    if broken:
        raise _refused(path, "it holds values that are no sums of squares", ", ".join(broken[:3]))
    config = read_json(base / "config.json")
    config = config.get("text_config") or config
    layers = config.get("num_hidden_layers")
    found = {int(match[1]) for name in entries if (match := LAYER.match(name))}
    if isinstance(layers, int) and found and max(found) + 1 != layers:
        raise _refused(path, "it belongs to another model", f"it knows {max(found) + 1} layers, the model has {layers}")
    for name, value in entries.items():
        wanted = config.get(FEEDS.get(name.removesuffix(".weight").rpartition(".")[2], ""))
        if LAYER.match(name) and isinstance(wanted, int) and value.shape[-1] != wanted:
            raise _refused(path, "it belongs to another model", f"{name} has {value.shape[-1]} columns, not {wanted}")


def read_imatrix(path: Path) -> dict[str, Array]:
    """Tensor name -> float32 [experts, in]. Raises ExportError (export-imatrix) when it is no importance matrix."""
    try:
        with path.open("rb") as stream:
            is_gguf = stream.read(4) == b"GGUF"
            stream.seek(0)
            entries = _read_gguf(path) if is_gguf else _read_older(stream)
    except (OSError, ValueError, KeyError, IndexError, struct.error, MemoryError, UnicodeDecodeError) as error:
        raise _refused(path, "it cannot be read as one", str(error) or type(error).__name__) from error
    if not entries:
        raise _refused(path, "it cannot be read as one", "no entry in it")
    return entries


def _read_gguf(path: Path) -> dict[str, Array]:
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.type"].contents()
    if kind != "imatrix":
        raise ValueError(f"a GGUF of the type {kind}")
    ending = ".in_sum2"
    return {
        tensor.name.removesuffix(ending): np.array(tensor.data, dtype=np.float32).reshape(-1, int(tensor.shape[0]))
        for tensor in reader.tensors
        if tensor.name.endswith(ending)
    }


def _read_older(stream: BinaryIO) -> dict[str, Array]:
    import numpy as np

    entries: dict[str, Array] = {}
    (count,) = struct.unpack("<i", stream.read(4))
    for _ in range(count):
        (length,) = struct.unpack("<i", stream.read(4))
        if not 0 < length <= LONGEST_NAME:
            raise ValueError(f"where its first name should be, it has a number ({length}) that is no length")
        name = stream.read(length).decode()
        _, values = struct.unpack("<ii", stream.read(8))
        data = stream.read(4 * values) if values > 0 else b""
        if not data or len(data) != 4 * values:
            raise ValueError(f"{name} is cut short")
        entries[name] = np.frombuffer(data, dtype="<f4")[None]
    return entries


def _refused(path: Path, what: str, why: str) -> ExportError:
    return ExportError(
        f"{path.name} is no importance matrix for this model: {what}", code="export-imatrix", where="imatrix", why=why,
        fix="make one with llama.cpp's llama-imatrix from this base model, or leave `imatrix` out: it is computed from "
        "the training data where a type needs one",
    )  # fmt: skip
