"""Write a model folder again with its linear layers quantised, shard by shard: memory is bounded by the largest tensor.

Embeddings, norms, biases and the head stay in 16 bits, byte for byte.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.reference import quiet_libraries
from dropforge.export.safetensors_stream import (
    INDEX,
    index_folder,
    read_header,
    read_tensor,
    weight_files,
    write_stream,
)
from dropforge.files import read_json, write_json
from dropforge.models.pictures import reads_pictures

if TYPE_CHECKING:
    import torch

Quantize = Callable[["torch.Tensor"], dict[str, "torch.Tensor"]]
"""A weight [out, in] -> what is stored for it, by the end of the name: "" is the weight itself, "_scale" its scales."""

# Layers that runtimes fuse into one matrix: either all of a group are quantised or none.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class LinearLayers:
    """Module paths of a model's linear layers."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    """Left in 16 bits: the head, and layers whose shape the format cannot take."""


def linear_layers(
    folder: Path, *, multiple: int, what: str, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> LinearLayers:
    """The linear layers of a merged folder, found in transformers' own model without its weights.

    `multiple`: both sides of a quantised matrix must be multiples of it. `what` names the export in errors. `shapes`
    are those of the weights in 16 bits, where the folder's own files are not.
    Raises ExportError (export-quantize-unsupported) for models whose matrices are not plain linear layers (mixtures of
    experts, GPT-2), and when no matrix has a shape that fits.
    """
    if reads_pictures(read_json(folder / "config.json")):
        raise _unsupported(what, why="it reads pictures too, and only matrices of models of text are quantised")
    stored = shapes or {name: info.shape for name, info in index_folder(folder).items()}
    linear, head = _modules(folder)
    other = [
        name for name, shape in stored.items()
        if (len(shape) > 2 or ".experts." in name) and not name.endswith("conv1d.weight")
    ]  # fmt: skip
    unstored = [module for module in linear if module != head and f"{module}.weight" not in stored]
    body = [module for module in linear if module != head]
    if other or unstored or not body:
        raise _unsupported(
            what, why=f"it has weights that are not plain linear layers: {', '.join([*other, *unstored][:3])}"
        )
    kept = {module for module in body if any(side % multiple for side in stored[f"{module}.weight"])}
    for module in list(kept):
        parent, _, name = module.rpartition(".")
        kept |= {f"{parent}.{other}" for group in _FUSED if name in group for other in group}
    quantized = tuple(sorted(set(body) - kept))
    if not quantized:
        raise _unsupported(what, why=f"no matrix has two sides that are multiples of {multiple}")
    return LinearLayers(quantized=quantized, kept=tuple(sorted((kept & set(body)) | ({head} if head else set()))))


def _modules(folder: Path) -> tuple[list[str], str]:
    """Paths of all torch.nn.Linear, and of the head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_libraries(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return linear, next((name for name, module in model.named_modules() if module is head), "")


def write_quantized(
    source: Path, target: Path, *, layers: LinearLayers, quantize: Quantize, stored: tuple[str, ...],
    config: dict[str, Any], more: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Fill the empty folder `target`: the shards of `source` quantised, its other files copied.

    `stored` lists the name endings `quantize` makes; `config` becomes config.json's quantization_config. `more` are
    small tensors of quantised modules, named MODULE.x, which go beside their weights.
    """
    beside: dict[str, list[str]] = {}
    for name in more or {}:
        beside.setdefault(f"{name.rpartition('.')[0]}.weight", []).append(name)
    weight_map: dict[str, str] = {}
    size = 0
    quantized = {f"{module}.weight" for module in layers.quantized}
    for file in weight_files(source):
        names = sorted(read_header(file))
        made = [name + end for name in names for end in (stored if name in quantized else ("",))]
        extra = [other for name in names for other in beside.get(name, ())]
        made += extra
        stream = _tensors(source, names, quantized=quantized, quantize=quantize)
        stream = itertools.chain(stream, ((name, (more or {})[name]) for name in extra))
        write_stream(target / file.name, stream, names=made)
        written = read_header(target / file.name)
        assert set(written) <= set(made), "quantize made something it did not announce"
        weight_map.update(dict.fromkeys(written, file.name))
        size += (target / file.name).stat().st_size
    if (source / INDEX).exists():
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in {INDEX, "config.json"}:
            shutil.copyfile(path, target / path.name)
    write_json(target / "config.json", {**read_json(source / "config.json"), "quantization_config": config})


def _tensors(
    source: Path, names: list[str], *, quantized: set[str], quantize: Quantize
) -> Iterator[tuple[str, torch.Tensor]]:
    infos = index_folder(source)
    for name in names:
        tensor = read_tensor(infos[name], name)
        if name not in quantized:
            yield name, tensor
            continue
        for end, part in quantize(tensor).items():
            yield name + end, part


def _unsupported(what: str, *, why: str) -> ExportError:
    return ExportError(
        f"{what} cannot hold this model", code="export-quantize-unsupported", where="export", why=why,
        fix="use merged or a GGUF type instead",
    )  # fmt: skip
