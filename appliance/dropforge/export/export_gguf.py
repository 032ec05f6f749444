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
from dropforge.export_kinds import GGUF_NEEDS_IMATRIX
from dropforge.llama_cpp.quantize import quantize
from dropforge.llama_cpp.server import usable_threads


def gguf_name(slug: str, gguf_type: str) -> str:
    """File name as the community writes it: the type at the end, in capitals."""
    return f"{slug}-{gguf_type.upper()}.gguf"


def export_gguf(stage: Stage, folder: Path, gguf_type: str) -> Made:
    """Write one GGUF into `folder` and verify it."""
    base = stage.base_gguf
    path = folder / gguf_name(stage.request.slug, gguf_type)
    fallbacks = 0
    more: dict[str, Any] = {}
    if gguf_type == base.gguf_type:
        os.link(base.path, path)
    else:
        stage.log(f"quantising to {gguf_type}")
        imatrix = None
        if gguf_type in GGUF_NEEDS_IMATRIX:
            imatrix, more["imatrix_tokens"] = stage.imatrix
        fallbacks = quantize(
            base.path, path, gguf_type=gguf_type, tools=stage.tools, threads=usable_threads(), imatrix=imatrix
        )
    stage.log(f"verifying {path.name}")
    checks = dict(base.checks)
    if gguf_type != base.gguf_type:
        checks = verify_gguf(path, gguf_type=gguf_type, expected=base.expected, tools=stage.tools)
    checks |= compare_weights(path, source=base.path)
    if fallbacks:
        checks["tensors_stored_larger"] = fallbacks
    return Made(path=path, checks={**checks, **more, **asdict(base.conversion)})
