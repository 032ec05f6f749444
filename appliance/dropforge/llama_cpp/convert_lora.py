"""A PEFT LoRA folder to a GGUF adapter, by llama.cpp's own converter in a child process."""

from __future__ import annotations

import sys
from pathlib import Path

from dropforge.llama_cpp.child import run_tool
from dropforge.llama_cpp.convert import OFFLINE
from dropforge.llama_cpp.locate import LlamaCpp


def convert_lora(adapter: Path, target: Path, *, base: Path, tools: LlamaCpp) -> None:
    """Write `target` in f32. The file holds one alpha; the runtime scales each pair by alpha over its own rank.

    `base` holds no code: config and weights of the model the adapter belongs to. Raises ExportError (export-convert).
    """
    run_tool(
        [
            sys.executable, tools.converter / "convert_lora_to_gguf.py", "--outfile", target, "--outtype", "f32",
            "--base", base, adapter,
        ],
        what="llama.cpp's converter could not read the adapter",
        code="export-convert",
        fix="export merged or gguf instead of lora_gguf",
        env=OFFLINE,
    )  # fmt: skip
