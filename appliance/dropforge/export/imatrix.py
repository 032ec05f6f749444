"""Importance matrix: the mean square of what each matrix is multiplied with, over training rows.

llama-quantize keeps the columns exact that matter. The sums come from the merged model in transformers, so that nothing
but its file has to be made; file format: llama.cpp, tools/imatrix (GGUF with NAME.in_sum2 [in] and NAME.counts [1]).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.reference import merged_model
from dropforge.export.samples import TrainingRow

if TYPE_CHECKING:
    import torch

ROW_TOKENS = 512
TOKENS = 8192


def write_imatrix(folder: Path, rows: tuple[TrainingRow, ...], *, gguf: Path, target: Path) -> int:
    """Write `target` for the merged model in `folder`, whose 16-bit GGUF is `gguf`; returns how many tokens were read.

    Raises ExportError (export-imatrix): there are no training rows, or a matrix of the model has no place in the GGUF.
    """
    if not rows:
        raise _failed(
            "no training rows were kept for the importance matrix", why="the model was trained by an earlier release",
            fix="train again, or choose a type from q2_k upwards",
        )  # fmt: skip
    with merged_model(folder) as (model, _):
        sums, tokens = _sums(model, rows)
        names = _gguf_names(sorted(sums), layers=int(model.config.num_hidden_layers), gguf=gguf)
    _write(target, {names[module]: value for module, value in sums.items() if module in names}, tokens=tokens)
    return tokens


def _sums(model: Any, rows: tuple[TrainingRow, ...]) -> tuple[dict[str, torch.Tensor], int]:
    """float32 [in] per linear layer: the sum of squares of its inputs; and the number of tokens."""
    import torch

    sums: dict[str, torch.Tensor] = {}

    def adds_to(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def add(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().float().pow(2).flatten(0, -2).sum(dim=0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    hooks = [
        module.register_forward_pre_hook(adds_to(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    tokens = 0
    try:
        with torch.no_grad():
            for row in rows:
                ids = row.ids[:ROW_TOKENS]
                if tokens and tokens + len(ids) > TOKENS:
                    break
                model(input_ids=torch.tensor([ids]))
                tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return sums, tokens


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
