"""Does a projector's GGUF hold what reads pictures in the merged folder? Every tensor is read back and compared.

What each tensor of the folder is called in a GGUF is gguf's own table; what it looks like there follows from what it
means: matrices [out, in] as they are, fused q, k and v in three parts, a convolution over time in one part per step.
Nothing may be missing, added, zero or no number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.picture_families import PictureFamily
from dropforge.export.picture_reference import PictureReader
from dropforge.export.tensor_reader import TensorReader
from dropforge.export.verify_weights import LIMITS
from dropforge.files import read_json
from dropforge.models.pictures import in_language_part, language_path, stored_names

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

ROW_END_NAME = "v.token_embd.img_break"
SUM_LIMIT = 0.001
"""The converter adds 1 to a norm of a float16 folder in float16; measured: 0.00024."""
_DEPTHS = ("num_hidden_layers", "depth")


def compare_projector(path: Path, *, merged: Path, reader: PictureReader) -> dict[str, Any]:
    """Compare every tensor; returns how many there are by stored type, and the worst error.

    Raises ExportError (projector-weights): one is missing, added, of another shape, zero, or off by more than its type
    may be.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected, sums = _expected(merged, reader.family, set(found), reader.tokenizer)
    missing, added = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or added:
        raise _wrong(path, f"missing: {', '.join(missing[:5]) or 'none'}; added: {', '.join(added[:5]) or 'none'}")
    worst: tuple[float, str] = (0.0, "")
    for name, tensor in found.items():
        error = _error(path, name, tensor, expected[name]())
        limit = LIMITS.get(tensor.tensor_type.name, 0.0)
        if name in sums:
            limit = max(limit, SUM_LIMIT)
        if not error <= limit:
            raise _wrong(
                path, f"{name} ({tensor.tensor_type.name}) is off by {error:.4g} of its size, allowed {limit:g}"
            )
        worst = max(worst, (error, name))
    return {
        "tensors_by_type": dict(Counter(tensor.tensor_type.name for tensor in found.values())),
        "worst_weight_error": round(worst[0], 5),
        "worst_tensor": worst[1],
    }


def places(folder: Path, names: Iterable[str], *, family: PictureFamily) -> dict[str, str]:
    """Tensor in the files -> its name in a projector's GGUF, of all `names` that belong to what reads pictures.

    Raises ExportError (projector-weights) for one that would be lost.
    """
    import gguf

    vision = read_json(folder / "config.json")["vision_config"]
    depth = next(int(vision[key]) for key in _DEPTHS if key in vision)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, depth)
    files, part = sorted(names), language_path(folder)
    loaded = {file: name for name, file in stored_names(folder, files).items()}
    found: dict[str, str] = {}
    for file in files:
        if (
            part is None
            or in_language_part(loaded.get(file, file), part)
            or any(word in file for word in family.unused)
        ):
            continue
        name = table.get_name(re.sub(r"_weight$", ".weight", file), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                f"{file} has no place in a projector's GGUF", code="projector-weights", where="safetensors",
                why="llama.cpp knows the names that published checkpoints have, and this is none of them",
                fix="leave gguf, mmproj and ollama out of `export`; adapter and merged hold everything",
            )  # fmt: skip
        found[file] = name
    return found


def _expected(merged: Path, family: PictureFamily, there: set[str], tokenizer: Any) -> tuple[dict[str, Any], set[str]]:
    """GGUF name -> function that gives the float32 values it must hold; and the names of those that are sums."""
    vision = read_json(merged / "config.json")["vision_config"]
    reader = TensorReader(merged)
    heads = int(vision.get("num_attention_heads", vision.get("num_heads", 1)))
    values: dict[str, Any] = {}
    sums: set[str] = set()
    for file, name in places(merged, reader.names, family=family).items():
        for gguf_name, piece in _pieces(name, there, reader.shape(file)).items():
            values[gguf_name] = _reading(reader, file, piece, family, heads)
            sums |= {gguf_name} if file.endswith(tuple(family.shifted)) else set()
    if family.row_end:
        row = int(tokenizer.convert_tokens_to_ids(family.row_end))
        table_name = next(name for name in reader.names if name.endswith("embed_tokens.weight"))
        values[ROW_END_NAME] = lambda: reader.rows(table_name, row, row + 1)[0].float().numpy()
    return values, sums


def _pieces(name: str, there: set[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """GGUF names that one tensor of the folder becomes, each with the part of it that it holds."""
    if "attn_qkv" in name and name not in there:
        third = shape[0] // 3
        return {
            name.replace("attn_qkv", f"attn_{letter}"): slice(place * third, (place + 1) * third)
            for place, letter in enumerate("qkv")
        }
    if len(shape) == 5:  # a convolution over time as well: [out, in, time, height, width]
        steps = range(shape[2])
        return {name + (f".{step}" if step else ""): (slice(None), slice(None), step) for step in steps}
    return {name: slice(None)}


def _reading(reader: TensorReader, file: str, piece: Any, family: PictureFamily, heads: int) -> Any:
    def values() -> Array:
        value: Array = reader.whole(file).float().numpy()[piece]
        if file.endswith(family.rotated):
            rows, columns = value.shape
            value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return value + next((shift for end, shift in family.shifted.items() if file.endswith(end)), 0.0)

    return values


def _error(path: Path, name: str, tensor: Any, truth: Array) -> float:
    """Root mean square of the difference over that of the truth."""
    import numpy as np
    from gguf.quants import dequantize

    mine = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if mine.shape != truth.shape:
        raise _wrong(path, f"{name} has the shape {mine.shape}, expected {truth.shape}")
    if not np.isfinite(mine).all() or not mine.any():
        raise _wrong(path, f"{name} holds {'nothing but zeros' if not mine.any() else 'values that are no numbers'}")
    return float(np.sqrt(((mine - truth) ** 2).mean()) / np.sqrt((truth**2).mean()))


def _wrong(path: Path, why: str) -> ExportError:
    return ExportError(
        "the projector's GGUF does not hold the merged weights", code="projector-weights", where=path.name, why=why,
        fix="use another export meanwhile, and please report this with provenance.json",
    )  # fmt: skip
