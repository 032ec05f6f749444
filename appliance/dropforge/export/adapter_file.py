"""Read a PEFT LoRA folder and sort its tensors by the base weight they change. Nothing unknown is passed over.

Key layout written by PEFT 0.21: `base_model.model.<module>.<part>`, where part is lora_A.weight [r, in], lora_B.weight
[out, r], lora_embedding_A [r, vocab], lora_embedding_B [hidden, r], lora_magnitude_vector [out] (DoRA),
base_layer.weight (a trained or resized layer under LoRA), or weight / bias (modules_to_save, bias training).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.files import read_json

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Variants whose merge is more than W + scale * B A, or which changed the base weights when they were attached.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "use_qalora", "velora_config", "kasa_config",
    "monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias",
)  # fmt: skip
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "lora_ga")
_PARTS = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|base_layer\.weight|base_layer\.bias|weight|bias)$"
)

_WRAPPED = re.compile(r"\.(?:original_module|modules_to_save(?:\.default)?)\.(?=weight$|bias$)")


@dataclass
class ModuleChange:
    """What the adapter does to one module. `low_rank` is (A [r, in], B [out, r], scale)."""

    low_rank: tuple[torch.Tensor, torch.Tensor, float] | None = None
    embedding: bool = False
    """The low-rank pair belongs to an embedding: the change is (B A) transposed."""
    magnitude: torch.Tensor | None = None
    """DoRA's norm per output row [out]."""
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    """`weight` and `bias` trained in full."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A parsed adapter: every tensor of the file is in exactly one change."""

    config: dict[str, Any]
    changes: dict[str, ModuleChange]
    """By module path in the base model, such as model.layers.0.mlp.up_proj."""
    tensors: int
    low_rank_all_zero: bool
    """Every lora_B is zero: the training changed nothing."""


def read_adapter(folder: Path) -> AdapterFile:
    """Parse and check a PEFT folder. Raises ExportError: export-adapter-unsupported, export-adapter-broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = read_json(folder / CONFIG)
        tensors = _once(load_file(folder / WEIGHTS, device="cpu"))
    except (OSError, ValueError, SafetensorError) as error:
        raise _broken(f"the adapter cannot be read: {str(error).splitlines()[0]}") from error
    _check_supported(config)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _PARTS.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if match is None:
            raise _broken(f"the adapter holds a tensor of an unknown kind: {key}")
        if not bool(tensor.isfinite().all()):
            raise _broken(f"the adapter holds a value that is not a number: {key}")
        grouped.setdefault(match["module"], {})[match["part"].removesuffix(".weight") or "weight"] = tensor
    changes = {module: _change(module, parts, config) for module, parts in grouped.items()}
    low_rank = [change.low_rank[1] for change in changes.values() if change.low_rank]
    return AdapterFile(
        config=config,
        changes=changes,
        tensors=len(tensors),
        low_rank_all_zero=bool(low_rank) and not any(bool(b.any()) for b in low_rank),
    )


def _once(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the copies that PEFT writes beside a module trained in full when the embedding has grown.

    The weight under the module's own name is the trained one; those under the two names of PEFT's wrapper repeat it
    and what it started from.
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (_WRAPPED.search(name) and _WRAPPED.sub(".", name) in tensors)
    }


def _check_supported(config: dict[str, Any]) -> None:
    used = [name for name in _UNSUPPORTED if config.get(name)]
    initial = config.get("init_lora_weights", True)
    if initial not in _PLAIN_INITS:
        used.append(f"init_lora_weights={initial}")
    if config.get("peft_type") != "LORA":
        used.append(f"peft_type={config.get('peft_type')}")
    if used:
        raise ExportError(
            "this kind of adapter cannot be merged exactly",
            code="export-adapter-unsupported",
            where=CONFIG,
            why=f"it uses {', '.join(used)}",
            fix="export `adapter` only, or train plain LoRA, rsLoRA or DoRA",
        )


def _change(module: str, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> ModuleChange:
    change = ModuleChange()
    for name, pair in (("plain", ("lora_A", "lora_B")), ("embedding", ("lora_embedding_A", "lora_embedding_B"))):
        first, second = (parts.pop(part, None) for part in pair)
        if first is None and second is None:
            continue
        if first is None or second is None or first.shape[0] != second.shape[1]:
            raise _broken(f"lora_A and lora_B of {module} do not fit together")
        change.low_rank = (first, second, scale(module, rank=first.shape[0], config=config))
        change.embedding = name == "embedding"
    change.magnitude = parts.pop("lora_magnitude_vector", None)
    for part, target in (("base_layer", "weight"), ("base_layer.bias", "bias"), ("weight", "weight"), ("bias", "bias")):
        if part in parts:
            change.replaced[target] = parts.pop(part)
    assert not parts, parts.keys()
    return change


def scale(module: str, *, rank: int, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha_pattern by PEFT's rule: the key matches the end of the path."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _broken(what: str) -> ExportError:
    return ExportError(what, code="export-adapter-broken", where=WEIGHTS)
