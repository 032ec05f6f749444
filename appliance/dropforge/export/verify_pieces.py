"""A quantised folder too large to be held: its matrices are dequantised one at a time by the library it is made for.

The model that runs is the merged one with each linear layer's weight taken from the quantised folder, and its inputs
rounded as the folder's configuration says. Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.export.reference import logprobs
from dropforge.export.streamed_model import streamed_model
from dropforge.export.tensor_reader import TensorReader
from dropforge.files import read_json

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[np.float32]]

Matrix = Callable[[str], "torch.Tensor"]
"""Module path -> its dequantised weight, float32 [out, in]."""


def fp8_matrix(folder: Path) -> Matrix:
    """Matrices of a compressed-tensors folder, through that library's own dequantisation."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    reader = TensorReader(folder)
    group = read_json(folder / "config.json")["quantization_config"]["config_groups"]["group_0"]
    arguments = QuantizationArgs.model_validate(group["weights"])

    def matrix(module: str) -> torch.Tensor:
        values, scale = reader.whole(f"{module}.weight"), reader.whole(f"{module}.weight_scale")
        found: torch.Tensor = dequantize(values, scale, None, args=arguments, dtype=scale.dtype)
        return found.float()

    return matrix


def nf4_matrix(folder: Path) -> Matrix:
    """Matrices of a bitsandbytes folder, through that library's own dequantisation."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    reader = TensorReader(folder)

    def matrix(module: str) -> torch.Tensor:
        start = f"{module}.weight."
        parts = {name.removeprefix(start): reader.whole(name) for name in reader.names if name.startswith(start)}
        state = QuantState.from_dict(qs_dict=parts, device=torch.device("cpu"))
        found: torch.Tensor = dequantize_4bit(reader.whole(f"{module}.weight"), state)
        return found.float()

    return matrix


def logprobs_in_pieces(
    source: Path, *, matrix: Matrix, quantized: tuple[str, ...], folder: Path, rows: list[list[int]],
    positions: list[list[int]],
) -> list[Array]:  # fmt: skip
    """reference.logprobs of the quantised folder; `source` is the merged folder, the origin of all other weights."""
    reader = TensorReader(source)
    names = {f"{module}.weight": module for module in quantized}
    last: tuple[str, torch.Tensor | None] = ("", None)

    def weight(name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal last
        if name not in names:
            return reader.rows(name, start, stop)
        if last[0] != name:
            last = ("", None)
            last = (name, matrix(names[name]))
        assert last[1] is not None
        return last[1][start:stop]

    with streamed_model(source, weight=weight) as model:
        _round_inputs(model, folder, quantized)
        return logprobs(model, rows, positions)


def _round_inputs(model: Any, folder: Path, quantized: tuple[str, ...]) -> None:
    """Round what goes into the quantised layers as compressed-tensors does; bitsandbytes leaves inputs alone."""
    config = read_json(folder / "config.json")["quantization_config"]
    if config["quant_method"] != "compressed-tensors":
        return
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments = QuantizationArgs.model_validate(config["config_groups"]["group_0"]["input_activations"])
    reader = TensorReader(folder)

    def rounds(path: str) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor]]:
        fixed = None if arguments.dynamic else reader.whole(f"{path}.input_scale")

        def round_inputs(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            value = inputs[0]
            scale, zero = (fixed, None) if fixed is not None else compute_dynamic_scales_and_zp(
                value=value, args=arguments, module=module
            )  # fmt: skip
            return (fake_quantize(x=value, scale=scale, zero_point=zero, args=arguments),)

        return round_inputs

    for path in quantized:
        model.get_submodule(path).register_forward_pre_hook(rounds(path))
