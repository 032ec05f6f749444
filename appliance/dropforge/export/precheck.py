"""What can be known to fail before the training starts: exports that the base model or the adapter cannot become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dropforge.errors import EnvironmentFault, ExportError
from dropforge.export.export_fp8 import MULTIPLE
from dropforge.export.export_merged_4bit import BLOCK as NF4_BLOCK
from dropforge.export.picture_families import without_projector
from dropforge.export.picture_reference import PictureReader
from dropforge.export.projector_weights import places
from dropforge.export.quantized_base import quantized_base
from dropforge.export.quantized_folder import linear_layers
from dropforge.export.safetensors_stream import index_folder
from dropforge.files import read_json
from dropforge.llama_cpp.architectures import architectures
from dropforge.llama_cpp.locate import find_llama_cpp
from dropforge.models.pictures import reads_pictures
from dropforge.models.remote_code import needs_code


def precheck(
    kinds: tuple[str, ...], *, base: Path, use_dora: bool = False, modules_to_save: tuple[str, ...] = ()
) -> None:
    """Raise ExportError for the first of `kinds` that cannot be made of the model in the folder `base`.

    Codes: export-unsupported (an architecture or a projector that llama.cpp does not convert, or nobody tried),
    export-picture, projector-weights, export-quantize-unsupported, export-lora-gguf, export-base-quantized,
    export-weights-missing. What is not known yet (llama.cpp is not built here) is left for later.
    """
    if set(kinds) <= {"adapter"}:
        return
    quantized = quantized_base(base)
    shapes = quantized.shapes if quantized else {name: info.shape for name, info in index_folder(base).items()}
    config: dict[str, Any] = read_json(base / "config.json")
    if needs_code(config):
        raise ExportError(
            "this model needs code of its own, and only its adapter can be exported", code="export-unsupported",
            where="config.json: auto_map",
            why="no other program could check or run the exported files without that code",
            fix="write export: [adapter]",
        )  # fmt: skip
    if any(kind.startswith(("gguf:", "lora_gguf", "ollama", "mmproj")) for kind in kinds):
        projector = any(kind.startswith("mmproj") for kind in kinds)
        if _converts(config, projector=projector) and projector:
            places(base, shapes, family=PictureReader(base).family)
    if "lora_gguf" in kinds and (use_dora or modules_to_save):
        raise ExportError(
            "this adapter cannot be a GGUF of its own", code="export-lora-gguf", where="export",
            why="DoRA trains more than low-rank pairs" if use_dora else f"{', '.join(modules_to_save)} trained in full",
            fix="export gguf (the merged model) instead of lora_gguf",
        )  # fmt: skip
    sides = {"fp8": MULTIPLE["channel"], "fp8:static": MULTIPLE["channel"], "fp8:block": MULTIPLE["block"]}
    for kind, multiple in {**sides, "merged_4bit": NF4_BLOCK}.items():
        if kind in kinds:
            linear_layers(base, multiple=multiple, what=kind, shapes=shapes)


def with_projector(kinds: tuple[str, ...], *, base: Path) -> tuple[str, ...]:
    """A GGUF of a model that reads pictures needs its projector beside it: `mmproj` is added where it was not asked."""
    needs = any(kind.startswith(("gguf:", "ollama")) for kind in kinds)
    has = any(kind.startswith("mmproj") for kind in kinds)
    if not needs or has or not reads_pictures(read_json(base / "config.json")):
        return kinds
    return (*(kind for kind in kinds if kind != "ollama"), "mmproj", *(kind for kind in kinds if kind == "ollama"))


def _converts(config: dict[str, Any], *, projector: bool) -> bool:
    """True when llama.cpp knows the architectures; False when that is not known yet."""
    names = [str(name) for name in config.get("architectures") or ()]
    try:
        known = architectures(find_llama_cpp())
    except EnvironmentFault:
        return False
    if names and not any(name in known.text for name in names):
        raise ExportError(
            f"llama.cpp cannot convert {', '.join(names)}", code="export-unsupported",
            where="config.json: architectures",
            why=f"its converter knows {len(known.text)} architectures, and this is none of them",
            fix="leave gguf, lora_gguf and ollama out of `export`; adapter and merged can be made",
        )  # fmt: skip
    shown = ", ".join(names)
    if config.get("audio_config") is not None:
        raise without_projector(shown, why="it also reads sounds, and what llama.cpp hears is not checked")
    if not projector:
        return True
    if not reads_pictures(config):
        raise ExportError(
            f"{shown} reads no pictures, so it has no projector", code="export-unsupported", where="export: mmproj",
            fix="leave mmproj out of `export`",
        )  # fmt: skip
    if not any(name in known.projector for name in names):
        raise without_projector(shown, why="llama.cpp does not know a projector for it")
    return True
