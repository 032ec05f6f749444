"""8-bit floating point weights (E4M3, largest value 448) and their scales, as vLLM and transformers read them.

    q = round(W / s) in E4M3,   W' = q s,   s = max |W| / 448
    channel   one s per output row           (weight_scale [out, 1])
    block     one s per 128 x 128 block      (weight_scale [ceil(out / 128), ceil(in / 128)])

Activations are quantised by the runtime, per token (channel) or per token and 128 inputs (block), or with one fixed
scale per layer from calibration data (static): s = the largest |input| / 448. Scales are float32:
the scales of small weights fall below float16's normal range. Format: compressed-tensors "float-quantized"; E4M3:
Micikevicius et al., FP8 Formats for Deep Learning, 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Strategy = Literal["channel", "block"]

LARGEST = 448.0
BLOCK = 128
SMALLEST_SCALE = 2.0**-100
"""Scale of an all-zero row or block: any positive number serves, and zero would make 0 / 0."""


def scale_shape(shape: tuple[int, ...], *, strategy: Strategy) -> tuple[int, int]:
    """Shape of the scales of a weight [out, in]."""
    rows, columns = shape
    return (rows, 1) if strategy == "channel" else (-(-rows // BLOCK), -(-columns // BLOCK))


def quantize(weight: torch.Tensor, *, strategy: Strategy) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, in], any float dtype -> (float8_e4m3fn [out, in], float32 scales of `scale_shape`)."""
    import torch

    value = weight.float()
    if strategy == "channel":
        largest = value.abs().amax(dim=1, keepdim=True)
    else:
        rows, columns = value.shape
        padded = torch.nn.functional.pad(value.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
        largest = blocks.amax(dim=(1, 3))
    scale = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
    scaled = value / spread(scale, tuple(value.shape))
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Scales as a float32 tensor that broadcasts against the weight `shape` [out, in]."""
    if scale.shape[1] == 1 and scale.shape[0] == shape[0]:
        return scale
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def quantization_config(*, strategy: Strategy, ignore: list[str], static: bool = False) -> dict[str, Any]:
    """The `quantization_config` of config.json; `ignore` names the linear layers left in 16 bits.

    `static`: inputs are rounded with one fixed scale per layer (input_scale [1]) instead of one per token.
    """
    shared = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**shared, "strategy": strategy, "dynamic": False}
    activations: dict[str, Any] = {**shared, "strategy": "token", "dynamic": True}
    if static:
        activations |= {"strategy": "tensor", "dynamic": False}
    elif strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
        activations |= {"strategy": "group", "group_size": BLOCK}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": "float-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
