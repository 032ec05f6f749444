"""Export `gguf:TYPE`: one file, made from the 16-bit GGUF, asked the same questions as the merged model."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dropforge.export.request import Made
from dropforge.export.stage import Stage
from dropforge.export.verify_gguf import verify_gguf
from dropforge.export.verify_weights import compare_weights
from dropforge.export_kinds import GGUF_NEEDS_IMATRIX, split_detail
from dropforge.gguf_names import gguf_name
from dropforge.llama_cpp.quantize import quantize
from dropforge.llama_cpp.server import usable_threads
from dropforge.llama_cpp.split import compare_parts, split_gguf


def export_gguf(stage: Stage, folder: Path, detail: str) -> Made:
    """Write one GGUF of the type in `detail` into `folder`, cut into parts if it names a size, and verify it."""
    gguf_type, largest = split_detail(detail)
    base = stage.base_gguf
    path = folder / gguf_name(stage.request.slug, gguf_type)
    fallbacks: dict[str, str] = {}
    more: dict[str, Any] = {}
    if gguf_type == base.gguf_type:
        os.link(base.path, path)
    else:
        stage.log(f"quantising to {gguf_type}")
        imatrix = stage.request.imatrix
        if imatrix is not None:
            more["imatrix"] = "the one given with the job"
        elif gguf_type in GGUF_NEEDS_IMATRIX:
            imatrix, more["imatrix_tokens"] = stage.imatrix
        fallbacks = quantize(
            base.path, path, gguf_type=gguf_type, tools=stage.tools, threads=usable_threads(), imatrix=imatrix
        )
    weights = compare_weights(path, source=base.path)
    first = path
    if largest and path.stat().st_size > largest:
        stage.log(f"cutting {path.name} into parts")
        parts = split_gguf(path, folder, stem=path.stem, largest=largest)
        compare_parts(path, parts)
        path.unlink()
        first, more["parts"] = parts[0], len(parts)
    stage.log(f"verifying {first.name}")
    checks = dict(base.checks)
    if gguf_type != base.gguf_type or first != path:
        checks = verify_gguf(first, gguf_type=gguf_type, expected=base.expected, tools=stage.tools)
    checks |= weights
    if fallbacks:
        checks["tensors_stored_larger"] = fallbacks
    checks |= {**more, **asdict(base.conversion)}
    return Made(path=path, checks=checks) if first == path else Made(path=folder, checks=checks, name=path.stem)
