"""How much room an export needs, computed before it writes anything: what is not there yet, and the file itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dropforge.errors import EnvironmentFault, Reason
from dropforge.export.quantized_base import quantized_base
from dropforge.export.safetensors_stream import index_folder
from dropforge.export_kinds import split_detail
from dropforge.facts import TOWER
from dropforge.files import free_bytes
from dropforge.plan import GGUF_BITS

if TYPE_CHECKING:
    from dropforge.export.stage import Stage

MARGIN = 64 * 2**20
"""Tokenizer, configuration, and what else is written to this disk meanwhile."""
SIXTEEN = 2.0
MATRIX_BYTES = {"fp8": 1.02, "merged_4bit": 0.52}
"""Bytes per weight of a quantised matrix with its scales; embeddings and the head stay in 16 bits."""
KEPT = ("embed_tokens", "lm_head", "wte")


def refuse_full_disk(stage: Stage, kind: str) -> None:
    """Raise EnvironmentFault (export-disk), with both numbers, when `kind` does not fit onto the disk."""
    request = stage.request
    needed, free = MARGIN + needed_bytes(stage, kind), free_bytes(request.result.path)
    if free < needed:
        raise EnvironmentFault(
            f"the disk is too full for {kind}: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free",
            code="export-disk", where=str(request.result.path.name), fix="free some space, then run `dropforge retry`",
            reason=Reason.DISK,
        )  # fmt: skip


def needed_bytes(stage: Stage, kind: str) -> int:
    """Bytes that making `kind` adds, with the shared products that are not there yet."""
    request = stage.request
    name, _, detail = kind.partition(":")
    adapter = sum(path.stat().st_size for path in request.adapter.iterdir()) if request.adapter else 0
    quantized = None if request.full else quantized_base(request.base_path)
    if quantized is not None:
        shapes: Mapping[str, tuple[int, ...]] = quantized.shapes
    else:
        shapes = {name: info.shape for name, info in index_folder(request.full or request.base_path).items()}
    numbers = sum(math.prod(shape) for shape in shapes.values())
    sixteen_bit = SIXTEEN * numbers
    total = 0.0
    if quantized is not None and not stage.has("base"):
        total += sixteen_bit
    if name == "adapter":
        return int(total + adapter)
    if name == "ollama":
        return 0
    if not stage.has("merged"):
        total += sixteen_bit
    if name == "gguf":
        gguf_type, part = split_detail(detail)
        own = GGUF_BITS.get(gguf_type, 16) / 8 * numbers
        total += own * 2 if part else own
    if name == "mmproj":
        total += sum(4 * math.prod(shape) for name, shape in shapes.items() if TOWER.search(name))
    if name == "lora_gguf":
        total += sixteen_bit + 4 * adapter
    elif name in ("gguf", "mmproj") and not stage.has("base gguf"):
        total += sixteen_bit
    if name in MATRIX_BYTES:
        kept = sum(math.prod(shape) for name, shape in shapes.items() if any(part in name for part in KEPT))
        total += MATRIX_BYTES[name] * (numbers - kept) + SIXTEEN * kept
    return int(total)
