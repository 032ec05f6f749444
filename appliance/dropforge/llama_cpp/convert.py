"""A Hugging Face folder to GGUF, by llama.cpp's own converter in a child process."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dropforge.llama_cpp.child import run_tool
from dropforge.llama_cpp.locate import LlamaCpp

CONVERTER_TYPES = ("f32", "f16", "bf16")
PROJECTOR_TYPES = (*CONVERTER_TYPES, "q8_0")
REPORT_MARK = "dropforge-convert: "
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
"""Environment of the converters: no network, no GPU."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What the converter did that is worth reporting."""

    pre_tokenizer: str
    """llama.cpp's name of the pre-tokenizer; empty for SentencePiece."""
    pre_tokenizer_by: str
    """hash (known to the converter), definition (recognised by us), or empty."""


def convert(
    folder: Path, target: Path, *, gguf_type: str, name: str, tools: LlamaCpp,
    metadata: Mapping[str, bool | int | str] | None = None,
) -> Conversion:  # fmt: skip
    """Write `target` as f32, f16 or bf16 from a folder that holds no code: config, safetensors, tokenizer.

    `metadata` is set in place of the converter's own, such as tokenizer.ggml.add_space_prefix or general.license.
    The child has no network and sees no GPU.
    Raises ExportError (export-convert) with the converter's last words.
    """
    assert gguf_type in CONVERTER_TYPES, gguf_type
    output = _run("text", folder, target, gguf_type=gguf_type, name=name, tools=tools, metadata=metadata)
    lines = [line for line in output.splitlines() if line.startswith(REPORT_MARK)]
    report = json.loads(lines[-1].removeprefix(REPORT_MARK)) if lines else {}
    return Conversion(
        pre_tokenizer=report.get("pre_tokenizer", ""), pre_tokenizer_by=report.get("pre_tokenizer_by", "")
    )


def convert_projector(
    folder: Path, target: Path, *, gguf_type: str, name: str, tools: LlamaCpp,
    metadata: Mapping[str, bool | int | str] | None = None,
) -> None:  # fmt: skip
    """Write the part of the model that reads pictures (llama.cpp's `--mmproj`), as f32, f16, bf16 or q8_0.

    Raises ExportError (export-convert) with the converter's last words.
    """
    assert gguf_type in PROJECTOR_TYPES, gguf_type
    _run("projector", folder, target, gguf_type=gguf_type, name=name, tools=tools, metadata=metadata)


def _run(
    part: str, folder: Path, target: Path, *, gguf_type: str, name: str, tools: LlamaCpp,
    metadata: Mapping[str, bool | int | str] | None,
) -> str:  # fmt: skip
    # -P: the folder we happen to run in must not lend the converter its modules.
    child = [sys.executable, "-P", "-m", "dropforge.llama_cpp.convert_child"]
    return run_tool(
        [*child, tools.converter, part, folder, target, gguf_type, name, json.dumps(metadata or {})],
        what=f"llama.cpp's converter could not read {folder.name}",
        code="export-convert",
        fix="if llama.cpp does not support the architecture, leave gguf and ollama out of `export`",
        env=OFFLINE,
    )
