"""Export `lora_gguf`: the adapter alone as a GGUF, for a GGUF of the base model and llama.cpp's `--lora`.

llama.cpp scales every pair by alpha / r with one alpha for the file. Other scales (rsLoRA's alpha / sqrt(r), patterns
of alpha) go into lora_B beforehand, so that the runtime's own factor makes them right: B' = B * scale * r / alpha.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from dropforge.errors import ExportError
from dropforge.export.adapter_file import CONFIG, PREFIX, WEIGHTS, AdapterFile, read_adapter
from dropforge.export.request import Made
from dropforge.export.safetensors_stream import INDEX, weight_files
from dropforge.export.stage import Stage
from dropforge.export.verify_gguf import verify_gguf
from dropforge.files import read_json, write_json
from dropforge.llama_cpp.convert import convert
from dropforge.llama_cpp.convert_lora import convert_lora

HEAD = "lm_head"


def export_lora_gguf(stage: Stage, folder: Path) -> Made:
    """Write one GGUF adapter into `folder`, proven on a GGUF of the base model.

    Raises ExportError: export-no-adapter, export-lora-gguf (an adapter that is more than low-rank pairs), and the codes
    of the conversion and of verify_gguf.
    """
    request = stage.request
    if request.adapter is None:
        raise ExportError(
            "this job trained every weight, so there is no adapter", code="export-no-adapter", where="export",
            fix="write gguf instead of lora_gguf",
        )  # fmt: skip
    adapter = read_adapter(request.adapter)
    refuse(adapter)
    scaled = request.work / "lora-scaled"
    write_scaled(request.adapter, adapter, scaled)
    inputs = stage.gguf_inputs
    path = folder / f"{request.slug}-lora-F32.gguf"
    stage.log("converting the adapter to GGUF")
    convert_lora(scaled, path, base=inputs.view, tools=stage.tools)
    stage.log("converting the base model to GGUF, to try the adapter on it")
    base = request.work / f"untrained-{inputs.gguf_type}.gguf"
    convert(
        _base_view(stage), base, gguf_type=inputs.gguf_type, name=request.model_id, tools=stage.tools,
        metadata=inputs.metadata,
    )  # fmt: skip
    stage.log(f"verifying {path.name}")
    checks = verify_gguf(base, gguf_type=inputs.gguf_type, expected=inputs.expected, tools=stage.tools, lora=path)
    base.unlink()
    return Made(path=path, checks={**checks, "type": "f32", "base_type": inputs.gguf_type})


def refuse(adapter: AdapterFile) -> None:
    """Raise ExportError (export-lora-gguf) unless every change is a low-rank pair of an inner matrix."""
    reasons = []
    if any(change.magnitude is not None for change in adapter.changes.values()):
        reasons.append("DoRA also trains the length of every row")
    replaced = sorted(module for module, change in adapter.changes.items() if change.replaced)
    if replaced:
        reasons.append(f"{', '.join(replaced[:3])} trained in full")
    if HEAD in adapter.changes or any(change.embedding for change in adapter.changes.values()):
        reasons.append("the embedding or the head is trained")
    if adapter.config.get("fan_in_fan_out"):
        reasons.append("the base keeps its matrices transposed")
    if reasons:
        raise ExportError(
            "this adapter cannot be a GGUF of its own", code="export-lora-gguf", where="export",
            why="; ".join(reasons), fix="export gguf (the merged model) instead of lora_gguf",
        )  # fmt: skip


def write_scaled(source: Path, adapter: AdapterFile, target: Path) -> None:
    """A copy of the adapter whose scale is alpha / r for every module; plain LoRA keeps its numbers."""
    from safetensors.torch import save_file

    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    alpha = float(adapter.config["lora_alpha"])
    tensors = {}
    for module, change in adapter.changes.items():
        assert change.low_rank is not None, "refuse() lets only pairs through"
        first, second, factor = change.low_rank
        wanted = factor * first.shape[0] / alpha
        tensors[f"{PREFIX}{module}.lora_A.weight"] = first.float().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = (second.float() * wanted).contiguous()
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    write_json(target / CONFIG, {**read_json(source / CONFIG), "use_rslora": False, "alpha_pattern": {}})


def _base_view(stage: Stage) -> Path:
    """The base model as the converter must see it: its weights, with tokenizer and settings of the merged folder."""
    view = stage.request.work / "lora-base-view"
    if view.exists():
        shutil.rmtree(view)
    view.mkdir()
    for path in stage.gguf_inputs.view.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, view / path.name)
    base = stage.base.folder
    for path in weight_files(base):
        (view / path.name).symlink_to(path.resolve())
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, view / INDEX)
    return view
