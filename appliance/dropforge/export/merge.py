"""Merge a trained adapter (or fully trained weights) into one 16-bit model folder, tensor by tensor.

    LoRA, rsLoRA   W' = W + s B A                       s = alpha / r, or alpha / sqrt(r)
    DoRA           W' = m (W + s B A) / |W + s B A|     norm per output row (Liu et al., DoRA, 2024)
    full modules   W' = the trained tensor

Arithmetic is float32; the result is rounded once to 16 bits. The stored type is bfloat16 for bfloat16 bases and float16
for float16 and float32 bases (finer steps), unless a value does not fit into float16: then bfloat16.
Every module of the adapter must meet its base weight, else nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.adapter_file import AdapterFile, ModuleChange, read_adapter
from dropforge.export.safetensors_stream import INDEX, SINGLE, TensorInfo, index_folder, read_tensor, write_file
from dropforge.files import read_json, write_json
from dropforge.models.pictures import reads_pictures, stored_names

if TYPE_CHECKING:
    import torch

HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What was merged. `modules_merged` equals `modules_in_adapter`, or the merge was refused."""

    dtype: str
    tensors: int
    modules_in_adapter: int
    modules_merged: int
    untied: bool
    """Input embedding and head were one tensor in the base and differ now."""


def merge(base: Path, adapter: Path | None, target: Path) -> MergeReport:
    """Write config.json and 16-bit weights into the existing empty folder `target`.

    Without an adapter the weights of `base` are only rounded. Raises ExportError: export-merge-partial when a module
    of the adapter has no base weight or another shape, and export-base-quantized, and the codes of adapter_file and
    safetensors_stream.
    """
    refuse_quantized(base)
    plan = _plan(base, read_adapter(adapter) if adapter else None)
    label = "bfloat16" if any(info.dtype == "BF16" for info in plan.base.values()) else "float16"
    try:
        _write(plan, target, label=label)
    except _DoesNotFit:
        label = "bfloat16"
        _write(plan, target, label=label)
    _write_config(base, target, label=label, plan=plan)
    return MergeReport(
        dtype=label,
        tensors=len(plan.shapes),
        modules_in_adapter=len(plan.adapter.changes) if plan.adapter else 0,
        modules_merged=len(plan.changes),
        untied=plan.untied,
    )


def refuse_quantized(base: Path) -> None:
    """Raise ExportError (export-base-quantized) when the base model's own files are quantised.

    A model that is only loaded in 4 bits for the training (`model.quantization: nf4`) has 16-bit files and passes.
    """
    found = read_json(base / "config.json").get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise ExportError(
            f"the base model's files are quantised themselves ({method})", code="export-base-quantized",
            where="config.json: quantization_config", why="an adapter is merged exactly onto 16-bit weights only",
            fix="train on the 16-bit model with `model.quantization: nf4`, or export only `adapter`",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which base tensor and which change make up each tensor of the result."""

    base: dict[str, TensorInfo]
    adapter: AdapterFile | None
    changes: dict[str, ModuleChange]
    sources: dict[str, str]
    """Name in the result -> name in the base (they differ only for a head that was tied)."""
    shapes: dict[str, tuple[int, ...]]
    untied: bool
    transposed: bool


class _DoesNotFit(Exception):  # noqa: N818  (control flow inside this file)
    """A value is beyond float16."""


def _plan(base_folder: Path, adapter: AdapterFile | None) -> _Plan:
    base = index_folder(base_folder)
    names = stored_names(base_folder, base)
    changes = {stored_module(names, module): change for module, change in (adapter.changes if adapter else {}).items()}
    sources = {name: name for name in base}
    embedding = "" if names.get(HEAD, HEAD) in base else _tied_embedding(base_folder, base)
    untied = bool(embedding) and bool({"lm_head", embedding.removesuffix(".weight")} & set(changes))
    if untied:
        sources[HEAD] = embedding
    _refuse_partial(changes, sources)
    shapes = {}
    for name, source in sources.items():
        module, _, part = name.rpartition(".")
        replaced = changes[module].replaced.get(part) if module in changes else None
        shapes[name] = tuple(replaced.shape) if replaced is not None else base[source].shape
        if shapes[name] != base[source].shape and name not in {HEAD, embedding or _embedding_name(base)}:
            raise _partial([f"{name}: trained {shapes[name]}, base {base[source].shape}"])
    return _Plan(
        base=base, adapter=adapter, changes=changes, sources=sources, shapes=shapes, untied=untied,
        transposed=bool(adapter and adapter.config.get("fan_in_fan_out")),
    )  # fmt: skip


def stored_module(names: Mapping[str, str], module: str) -> str:
    """Path in the files of a module of the loaded model; `names` are stored_names'."""
    return names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")


def _embedding_name(base: dict[str, TensorInfo]) -> str:
    names = [name for name in base if name.endswith(("embed_tokens.weight", "wte.weight"))]
    return names[0] if names else ""


def _tied_embedding(folder: Path, base: dict[str, TensorInfo]) -> str:
    """Name of the input embedding when the base, which has no head in its files, shares it with the head."""
    config = read_json(folder / "config.json")
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    if tied is None:
        tied = reads_pictures(config)  # such files often leave it to their class's own default
    return _embedding_name(base) if tied else ""


def _refuse_partial(changes: dict[str, ModuleChange], sources: dict[str, str]) -> None:
    unmatched = [module for module in changes if f"{module}.weight" not in sources]
    unmatched += [
        f"{module}.{part}"
        for module, change in changes.items()
        for part in change.replaced
        if f"{module}.weight" in sources and f"{module}.{part}" not in sources
    ]
    if unmatched:
        raise _partial(unmatched)


def _partial(names: list[str]) -> ExportError:
    shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
    return ExportError(
        f"{len(names)} trained modules do not fit the base model, so nothing was merged",
        code="export-merge-partial",
        where=shown,
        why="a merge that leaves trained modules out would look like a success",
        fix="check that `model` is the base the adapter was trained on",
    )


def _write(plan: _Plan, target: Path, *, label: str) -> None:
    """One output file per base file, so that huge models stay sharded as their base was."""
    import torch

    files = sorted({info.file.name for info in plan.base.values()})
    owner = {name: plan.base[source].file.name for name, source in plan.sources.items()}
    names = {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, start=1)}
    if len(files) == 1:
        names = {files[0]: SINGLE}
    dtype: torch.dtype = getattr(torch, label)
    for file in files:
        shapes = {name: shape for name, shape in plan.shapes.items() if owner[name] == file}
        write_file(target / names[file], shapes, dtype=dtype, tensor=lambda name: _merged(plan, name, dtype))
    if len(files) > 1:
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        weight_map = {name: names[owner[name]] for name in sorted(plan.shapes)}
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _merged(plan: _Plan, name: str, dtype: torch.dtype) -> torch.Tensor:
    import torch

    module, _, part = name.rpartition(".")
    change = plan.changes.get(module)
    replaced = change.replaced.get(part) if change else None
    source = plan.sources[name]
    stored = replaced if replaced is not None else read_tensor(plan.base[source], source)
    if stored.dtype == dtype and (change is None or part != "weight" or change.low_rank is None):
        return stored  # nothing to add and nothing to round: an embedding is not copied into float32
    value = stored.float()
    if change is not None and part == "weight":
        value = apply_change(value, change, transposed=plan.transposed)
    rounded = value.to(dtype)
    if dtype is torch.float16 and not bool(rounded.isfinite().all()) and bool(value.isfinite().all()):
        raise _DoesNotFit
    return rounded


def apply_change(weight: torch.Tensor, change: ModuleChange, *, transposed: bool) -> torch.Tensor:
    """The merged weight in float32. `weight` is [out, in] float32 ([in, out] when `transposed`, GPT-2's Conv1D)."""
    import torch

    if change.low_rank is None:
        return weight
    first, second, factor = change.low_rank
    delta = (second.float() @ first.float()) * factor
    if change.embedding or transposed:
        delta = delta.T
    if delta.shape != weight.shape:
        raise _partial([f"a low-rank pair of shape {tuple(delta.shape)} for a weight of {tuple(weight.shape)}"])
    merged = weight + delta
    if change.magnitude is not None:
        rows = 0 if transposed or change.embedding else 1
        norm = torch.linalg.norm(merged, dim=rows, keepdim=True)
        merged = merged * (change.magnitude.float().reshape(norm.shape) / norm)
    return merged


def _write_config(base: Path, target: Path, *, label: str, plan: _Plan) -> None:
    config: dict[str, Any] = read_json(base / "config.json")
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = label
    text = config.get("text_config", config)
    for part in (text, config.get("vision_config", {})):
        if part.keys() & {"dtype", "torch_dtype"}:
            part.pop("torch_dtype", None)
            part["dtype"] = label
    if plan.untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    embedding = _embedding_name(plan.base)
    if embedding and plan.shapes[embedding] != plan.base[embedding].shape:
        text["vocab_size"] = plan.shapes[embedding][0]
    write_json(target / "config.json", config)
    if (base / "generation_config.json").exists():
        write_json(target / "generation_config.json", read_json(base / "generation_config.json"))
