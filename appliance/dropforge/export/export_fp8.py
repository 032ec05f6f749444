"""Exports `fp8` and `fp8:block`: a folder of 8-bit weights for vLLM and transformers, made from the merged folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.export.fp8_format import BLOCK, Strategy, quantization_config, quantize
from dropforge.export.quantized_folder import linear_layers, write_quantized
from dropforge.export.request import Made
from dropforge.export.stage import Stage
from dropforge.export.verify_quantized import FP8, verify_quantized

if TYPE_CHECKING:
    import torch

# vLLM's row-wise FP8 kernels take sides that are multiples of 16, its block kernels whole blocks.
MULTIPLE: dict[Strategy, int] = {"channel": 16, "block": BLOCK}


def export_fp8(stage: Stage, folder: Path, detail: str) -> Made:
    """Fill the empty `folder`. Raises ExportError: export-quantize-unsupported, and verify_quantized's codes."""
    strategy: Strategy = "block" if detail == "block" else "channel"
    source = stage.merged.folder
    layers = linear_layers(source, multiple=MULTIPLE[strategy], what="fp8")

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values, scale = quantize(weight, strategy=strategy)
        return {"": values, "_scale": scale}

    stage.log(f"quantising to FP8 ({strategy})")
    write_quantized(
        source, folder, layers=layers, quantize=parts, stored=("", "_scale"),
        config=quantization_config(strategy=strategy, ignore=list(layers.kept)),
    )  # fmt: skip
    stage.log("comparing the FP8 folder with the merged model")
    checks = verify_quantized(folder, source=source, layers=layers, answers=stage.merged.answers, limits=FP8)
    return Made(path=folder, checks={"strategy": strategy, **checks})
