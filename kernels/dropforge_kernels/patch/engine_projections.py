"""One projection as the model has it, plain, quantised or wrapped by PEFT: weight, adapter, and what is in the way."""

from __future__ import annotations

from typing import Any

from torch import nn

from dropforge_kernels.modules.adapters import Adapted
from dropforge_kernels.modules.weights import nf4_obstacle


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has wrapped it."""
    return "lora_A" in module._modules


def base_of(module: Any) -> Any:
    """The linear layer itself."""
    return module.base_layer if is_adapted(module) else module


def is_nf4(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes has quantised it."""
    return getattr(parameter, "quant_state", None) is not None


def base_obstacle(base: Any) -> str | None:
    """Why the engine cannot take this linear layer's weight; None when it can."""
    if type(base).__name__ not in ("Linear", "Linear4bit"):
        return f"a projection is a {type(base).__name__}"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "its base weights are trained"
    if base._forward_hooks or base._forward_pre_hooks:
        return "a hook watches its projections"
    if type(base).__name__ == "Linear4bit":
        return nf4_obstacle(base.weight)
    return None


def adapter_obstacle(module: Any) -> str | None:
    """Why the engine cannot compute this projection's adapter; None when it can, or when there is none."""
    if not is_adapted(module):
        return None
    active = module.active_adapters
    if module.disable_adapters or module.merged:
        return "its adapter is switched off or merged"
    if len(active) != 1 or active[0] not in module.lora_A:
        return "it has several active adapters" if len(active) > 1 else "its active adapter is not on every projection"
    name = active[0]
    if type(module.lora_dropout[name]) is not nn.Identity:
        return "its adapter has dropout"
    if module.lora_variant.get(name) is not None:
        return f"its adapter is a {type(module.lora_variant[name]).__name__.removesuffix('LinearVariant')}"
    if module.lora_bias.get(name):
        return "its adapter has a bias"
    if module._forward_hooks or module._forward_pre_hooks:
        return "a hook watches its adapter"
    return None


def adapted(module: Any) -> Adapted:
    """What the decoder needs of it."""
    base = base_of(module)
    if not is_adapted(module):
        return Adapted(outputs=base.out_features, bias=base.bias)
    name = module.active_adapters[0]
    return Adapted(
        outputs=base.out_features,
        bias=base.bias,
        a=module.lora_A[name].weight,
        b=module.lora_B[name].weight,
        scale=module.scaling[name],
    )
