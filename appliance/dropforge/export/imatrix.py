"""Importance matrix: the mean square of what each matrix is multiplied with, over training rows.

llama-quantize keeps the columns exact that matter. The sums come from the merged model in transformers, so that nothing
but its file has to be made; file format: llama.cpp, tools/imatrix (GGUF with NAME.in_sum2 [in] and NAME.counts [1]).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.errors import ExportError
from dropforge.export.calibration import ROW_TOKENS, input_statistics
from dropforge.export.samples import TrainingRow

if TYPE_CHECKING:
    import torch


def write_imatrix(folder: Path, rows: tuple[TrainingRow, ...], *, gguf: Path, target: Path) -> int:
    """Write `target` for the merged model in `folder`, whose 16-bit GGUF is `gguf`; returns how many tokens were read.

    Raises ExportError (export-imatrix): there are no training rows, or a matrix of the model has no place in the GGUF.
    """
    if not rows:
        raise _failed(
            "no training rows were kept for the importance matrix", why="the model was trained by an earlier release",
            fix="train again, or choose a type from q2_k upwards",
        )  # fmt: skip
    found = input_statistics(folder, rows)
    names = _gguf_names(sorted(found.squares), layers=found.layers, gguf=gguf)
    sums = {names[module]: value for module, value in found.squares.items() if module in names}
    _write(target, sums, tokens=found.tokens)
    return found.tokens


def _gguf_names(modules: list[str], *, layers: int, gguf: Path) -> dict[str, str]:
    """Module path -> tensor name in the GGUF. The head of a tied model has none of its own and is left out."""
    import gguf as library

    reader = library.GGUFReader(gguf)
    field = reader.fields["general.architecture"]
    architecture = bytes(field.parts[field.data[0]]).decode()
    known = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise _failed(f"no importance matrix for the architecture {architecture}", why="its tensor names are not known")
    table = library.get_tensor_name_map(known[architecture], layers)
    there = {tensor.name for tensor in reader.tensors}
    names = {module: f"{table.get_name(module)}.weight" for module in modules}
    lost = sorted(module for module, name in names.items() if name not in there and name != "output.weight")
    if lost:
        raise _failed("matrices of the model have no place in the GGUF", why=", ".join(lost[:5]))
    return {module: name for module, name in names.items() if name in there}


def _write(target: Path, sums: dict[str, torch.Tensor], *, tokens: int) -> None:
    import gguf as library
    import numpy as np

    writer = library.GGUFWriter(target, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["training data"])
    writer.add_uint32("imatrix.chunk_count", max(1, tokens // ROW_TOKENS))
    writer.add_uint32("imatrix.chunk_size", ROW_TOKENS)
    for name, value in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", value.numpy().astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[tokens]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _failed(what: str, *, why: str, fix: str = "choose a type that needs none, such as gguf:q3_k_m") -> ExportError:
    return ExportError(what, code="export-imatrix", where="export", why=why, fix=fix)
