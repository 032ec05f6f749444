"""PiSSA, OLoRA and LoftQ adapters as plain LoRA, which every reader knows.

Both start from a part of the weight itself and take it out of the base: W0 = W - s B0 A0. After training the model is
W0 + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0], so twice the rank holds it for the untouched base.
(Meng et al., PiSSA, 2024; Bueyuekakyuez, OLoRA, 2024.) Where W0 was rounded to 16 bits, that rounding is left out.
LoftQ starts from W - Q, what quantising lost (Li et al. 2023): its base in memory is W0 = Q, and the same holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHANGES_BASE = ("pissa", "olora", "loftq")
_STACKED = {".lora_A.weight": 0, ".lora_embedding_A": 0, ".lora_B.weight": 1, ".lora_embedding_B": 1}
"""Along which side of a tensor the rank lies, by the end of its name."""


def initial_pairs(model: Any, *, init: str) -> dict[str, torch.Tensor]:
    """Copies of the fresh adapter's tensors by their names in an adapter file; empty when the base was left alone."""
    if init not in CHANGES_BASE:
        return {}
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {name: value.detach().cpu().clone() for name, value in state.items() if _side(name) is not None}


def to_plain_lora(folder: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """Rewrite the PEFT folder of a trained PiSSA or OLoRA adapter; nothing to do when `initial` is empty."""
    if not initial:
        return
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, start in initial.items():
        side = _side(name)
        assert side is not None and name in tensors, f"{name} was attached but not saved"
        # B0 enters with a minus sign, so that its product with A0 is taken away again.
        tensors[name] = torch.cat([tensors[name], (start if side == 0 else -start).to(tensors[name])], dim=side)
    save_file({name: value.contiguous() for name, value in sorted(tensors.items())}, path, metadata={"format": "pt"})
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text())
    # Twice the rank with the same scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
    config["lora_alpha"] *= math.sqrt(2) if config.get("use_rslora") else 2
    config["r"] *= 2
    config["init_lora_weights"] = True
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _side(name: str) -> int | None:
    return next((side for end, side in _STACKED.items() if name.endswith(end)), None)
