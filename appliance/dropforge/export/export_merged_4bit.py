"""Export `merged_4bit`: the merged model in NF4 (Dettmers et al., QLoRA, 2023), for transformers and bitsandbytes.

Every matrix is cut into blocks of 64 values with one scale each; the scales are quantised to 8 bits themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.export.quantized_folder import linear_layers, write_quantized
from dropforge.export.request import Made
from dropforge.export.stage import Stage
from dropforge.export.verify_quantized import NF4, verify_quantized

if TYPE_CHECKING:
    import torch

BLOCK = 64
STORED = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
"""Name endings of what bitsandbytes keeps for one matrix; the last holds shape, dtype and block sizes as JSON."""


def export_merged_4bit(stage: Stage, folder: Path) -> Made:
    """Fill the empty `folder`. Raises ExportError: export-quantize-unsupported, and verify_quantized's codes."""
    merged = stage.merged
    layers = linear_layers(merged.folder, multiple=BLOCK, what="merged_4bit")
    stage.log("quantising to NF4")
    write_quantized(
        merged.folder, folder, layers=layers, quantize=quantize, stored=STORED,
        config=quantization_config(compute=merged.dtype, skip=list(layers.kept)),
    )  # fmt: skip
    stage.log("comparing the NF4 folder with the merged model")
    checks = verify_quantized(
        folder, source=merged.folder, layers=layers, answers=merged.answers, limits=NF4, judged=merged.judged
    )
    return Made(path=folder, checks=checks)


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`weight` [out, in] of 16 bits -> packed uint8 [out * in / 2, 1] and bitsandbytes' state, by STORED's endings."""
    from bitsandbytes.functional import quantize_4bit

    values, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return {"": values, **{f".{name}": part for name, part in state.as_dict(packed=True).items()}}


def quantization_config(*, compute: str, skip: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `skip` names the linear layers left in 16 bits."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip,
    }  # fmt: skip
