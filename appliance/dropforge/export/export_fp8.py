"""Exports `fp8`, `fp8:block` and `fp8:static`: 8-bit weights for vLLM and transformers, made from the merged folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dropforge.errors import ExportError
from dropforge.export.fp8_format import BLOCK, LARGEST, SMALLEST_SCALE, Strategy, quantization_config, quantize
from dropforge.export.quantized_folder import linear_layers, write_quantized
from dropforge.export.request import Made
from dropforge.export.stage import Stage
from dropforge.export.verify_quantized import FP8, verify_quantized

if TYPE_CHECKING:
    import torch

# vLLM's row-wise FP8 kernels take sides that are multiples of 16, its block kernels whole blocks.
MULTIPLE: dict[Strategy, int] = {"channel": 16, "block": BLOCK}


def export_fp8(stage: Stage, folder: Path, detail: str) -> Made:
    """Fill the empty `folder`.

    Raises ExportError: export-quantize-unsupported, export-calibration (static without training rows), and
    verify_quantized's codes.
    """
    strategy: Strategy = "block" if detail == "block" else "channel"
    static = detail == "static"
    source = stage.merged.folder
    layers = linear_layers(source, multiple=MULTIPLE[strategy], what="fp8")

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values, scale = quantize(weight, strategy=strategy)
        return {"": values, "_scale": scale}

    scales, tokens = _input_scales(stage, layers.quantized) if static else ({}, 0)
    stage.log(f"quantising to FP8 ({detail or strategy})")
    write_quantized(
        source, folder, layers=layers, quantize=parts, stored=("", "_scale"),
        config=quantization_config(strategy=strategy, ignore=list(layers.kept), static=static), more=scales,
    )  # fmt: skip
    stage.log("comparing the FP8 folder with the merged model")
    checks = verify_quantized(
        folder, source=source, layers=layers, answers=stage.merged.answers, limits=FP8, judged=stage.merged.judged
    )
    calibrated = {"calibration_tokens": tokens} if static else {}
    return Made(path=folder, checks={"strategy": strategy, **calibrated, **checks})


def _input_scales(stage: Stage, modules: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], int]:
    """float32 [1] per module from the training rows, under the names of the file, and how many tokens were read."""
    import torch

    if not stage.request.samples:
        raise ExportError(
            "no training rows were kept to calibrate with", code="export-calibration", where="export",
            why="the model was trained by an earlier release", fix="use fp8, whose scales are found at run time",
        )  # fmt: skip
    stage.log("measuring the inputs of every layer over the training data")
    found = stage.statistics
    largest = {module: max(found.largest[module], SMALLEST_SCALE) for module in modules}
    return {f"{name}.input_scale": torch.tensor([value / LARGEST]) for name, value in largest.items()}, found.tokens
