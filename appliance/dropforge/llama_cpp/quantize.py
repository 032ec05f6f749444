"""llama-quantize: from one 16-bit GGUF to every other type."""

from __future__ import annotations

import re
from pathlib import Path

from dropforge.llama_cpp.child import run_tool
from dropforge.llama_cpp.locate import LlamaCpp

# llama-quantize has no name for this one: embeddings and head in q8_0, the rest in q2_k.
_MIXED = {"q2_k_l": ("q2_k", ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"))}
_FALLBACKS = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")


def quantize(
    source: Path, target: Path, *, gguf_type: str, tools: LlamaCpp, threads: int, imatrix: Path | None = None
) -> int:
    """Write `target` as `gguf_type` (a name such as q4_k_m) from the f32, f16 or bf16 file `source`.

    `imatrix` is an importance matrix; types below q2_k need one. Returns how many tensors fell back to a larger type
    because their rows do not fit the type's blocks.
    Raises ExportError (export-quantize) with llama-quantize's last words.
    """
    named, more = _MIXED.get(gguf_type, (gguf_type, ()))
    options: list[str | Path] = ["--imatrix", imatrix] if imatrix else []
    options += more
    output = run_tool(
        [tools.tool("llama-quantize"), *options, source, target, named.upper(), str(threads)],
        what=f"llama-quantize could not make {gguf_type}",
        code="export-quantize",
        fix="choose another type, for example gguf:q8_0",
    )
    said = _FALLBACKS.search(output)
    return int(said[1]) if said else 0
