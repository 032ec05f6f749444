"""llama-quantize: from one 16-bit GGUF to every other type."""

from __future__ import annotations

import re
from pathlib import Path

from dropforge.errors import ExportError
from dropforge.llama_cpp.child import run_tool
from dropforge.llama_cpp.locate import LlamaCpp

# llama-quantize has no name for this one: embeddings and head in q8_0, the rest in q2_k.
_MIXED = {"q2_k_l": ("q2_k", ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"))}
_FALLBACKS = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")
_FALLBACK = re.compile(
    r"^warning: (\S+) +- ncols +\d+ not divisible by \d+ \(required for type +(\S+)\) -> falling back to +(\S+)", re.M
)


def quantize(
    source: Path, target: Path, *, gguf_type: str, tools: LlamaCpp, threads: int, imatrix: Path | None = None
) -> dict[str, str]:
    """Write `target` as `gguf_type` (a name such as q4_k_m) from the f32, f16 or bf16 file `source`.

    `imatrix` is an importance matrix; types below q2_k need one. Returns the tensors that fell back to another type
    because their rows do not fit the type's blocks, each with both types: {"blk.0.attn_k.weight": "q4_K -> q5_0"}.
    Raises ExportError (export-quantize) with llama-quantize's last words, or when it reports more fallbacks than it
    names.
    """
    named, more = _MIXED.get(gguf_type, (gguf_type, ()))
    # llama-quantize writes the name it was given into the file: the bare one says nothing about this machine.
    options: list[str | Path] = ["--imatrix", imatrix.name] if imatrix else []
    options += more
    output = run_tool(
        [tools.tool("llama-quantize"), *options, source.absolute(), target.absolute(), named.upper(), str(threads)],
        what=f"llama-quantize could not make {gguf_type}",
        code="export-quantize",
        fix="choose another type, for example gguf:q8_0",
        cwd=imatrix.parent if imatrix else None,
    )
    return fallbacks(output)


def fallbacks(output: str) -> dict[str, str]:
    """The tensors that llama-quantize's `output` says fell back. Raises ExportError when its count is another."""
    found = {name: f"{wanted} -> {used}" for name, wanted, used in _FALLBACK.findall(output)}
    said = _FALLBACKS.search(output)
    if (int(said[1]) if said else 0) != len(found):
        raise ExportError(
            "llama-quantize's report of fallbacks could not be read", code="export-quantize",
            why=f"it counts {said[1] if said else 0} tensors and names {len(found)}",
            fix="this is a fault of Dropforge; please report it with provenance.json",
        )  # fmt: skip
    return found
