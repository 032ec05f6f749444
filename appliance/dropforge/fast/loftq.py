"""LoftQ: LoRA matrices that start as the best low-rank repair of what quantising a weight lost.

With W the stored 16-bit weight, Q its 4-bit copy in memory and s the scale of the adapter:  s B A = SVD_r(W - Q).
(Li et al., LoftQ, 2023, with one round of its iteration, since Q is given.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."


def start_from_residual(model: Any, *, folder: Path, adapter: str = "default") -> int:
    """Fill A and B of every 4-bit layer that has an adapter. Returns how many there were.

    folder: where the base model's 16-bit safetensors lie. Each weight is read, used and let go again, on the device of
    its layer; the decomposition runs in fp32.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    files = _files(folder)
    count = 0
    with torch.no_grad():
        for path, module in model.named_modules():
            if not isinstance(module, Linear4bit) or adapter not in module.lora_A:
                continue
            quantised: Any = module.get_base_layer().weight
            weight = _read(files, path.removeprefix(PREFIX) + ".weight").to(quantised.device, torch.float32)
            residual = weight - dequantize_4bit(quantised.data, quantised.quant_state).float().view_as(weight)
            # Randomised, a few times the rank: exact to fp32 for the leading directions and far faster than a full one.
            rank = module.r[adapter]
            U, S, V = torch.svd_lowrank(residual, q=min(rank + 16, min(residual.shape)), niter=4)
            root = (S[:rank] / module.scaling[adapter]).sqrt()
            module.lora_A[adapter].weight.copy_(root[:, None] * V[:, :rank].T)
            module.lora_B[adapter].weight.copy_(U[:, :rank] * root)
            count += 1
    return count


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(files: dict[str, Path], name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(files[name], framework="pt", device="cpu") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
