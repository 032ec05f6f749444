"""Export `projector`: the part of a model that reads pictures as a GGUF of its own, for llama.cpp's `--mmproj`."""

from __future__ import annotations

from pathlib import Path

from dropforge.export.base_license import origin
from dropforge.export.picture_reference import PictureReader
from dropforge.export.projector_weights import compare_projector
from dropforge.export.request import Made
from dropforge.export.stage import Stage
from dropforge.export.tensor_reader import TensorReader
from dropforge.export.verify_projector import verify_projector
from dropforge.gguf_names import projector_name
from dropforge.llama_cpp.convert import convert_projector
from dropforge.models.pictures import in_language_part, language_path, stored_names


def export_projector(stage: Stage, folder: Path, detail: str) -> Made:
    """Write and verify the projector of the type in `detail`; f16, or bf16 for values beyond f16, when it is empty."""
    request, base = stage.request, stage.base_gguf
    merged = stage.merged.folder
    reader = PictureReader(merged)
    gguf_type = detail or ("f16" if _fits(merged) else "bf16")
    path = folder / projector_name(request.slug, gguf_type)
    stage.log(f"converting the projector to GGUF ({gguf_type})")
    convert_projector(
        stage.gguf_inputs.view, path, gguf_type=gguf_type, name=request.name, tools=stage.tools,
        metadata=origin(request.model_id, base=request.base_path),
    )  # fmt: skip
    stage.log(f"verifying {path.name}")
    weights = compare_projector(path, merged=merged, reader=reader)
    checks = verify_projector(
        path, gguf_type=gguf_type, text=base.path, text_type=base.gguf_type, reader=reader, tools=stage.tools
    )
    return Made(path=path, checks={**checks, **weights})


def _fits(merged: Path) -> bool:
    """Every value of what reads pictures is within float16."""
    import torch

    reader, part = TensorReader(merged), language_path(merged)
    loaded = {file: name for name, file in stored_names(merged, reader.names).items()}
    largest = torch.finfo(torch.float16).max
    return part is not None and all(
        float(reader.whole(file).abs().max()) <= largest
        for file in reader.names
        if not in_language_part(loaded.get(file, file), part)
    )
