"""What an engine was built on, compared with the model before every forward: nobody may train what it does not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dropforge_kernels.modules.adapters import Adapted
from dropforge_kernels.patch.engine_projections import adapted, adapter_obstacle, base_of, is_adapted


@dataclass(frozen=True)
class Place:
    """Where a projection hangs, and what was read from it."""

    parent: nn.Module
    name: str
    module: Any
    base: nn.Module
    active: str | None
    """The adapter's name; None without one."""
    adapter: Adapted


@dataclass(frozen=True)
class Watch:
    """Taken when the engine is built."""

    holder: nn.Module
    """transformers' list of layers."""
    layers: tuple[nn.Module, ...]
    places: tuple[Place, ...]
    frozen: tuple[nn.Parameter, ...]
    """The layers' own parameters, which must not be trained."""
    pointers: tuple[tuple[nn.Parameter, int], ...]
    """The matrices and where they were: a model that was moved meanwhile must not be trained from old memory."""

    @classmethod
    def of(cls, holder: Any, projections: Sequence[Iterable[nn.Module]], matrices: Iterable[nn.Parameter]) -> Watch:
        """holder: the list of layers. projections: of each layer. matrices: of all of them."""
        layers = tuple(holder)
        places = [
            place
            for layer, wanted in zip(layers, projections, strict=True)
            for place in _places(layer, {id(module) for module in wanted})
        ]
        return cls(
            holder=holder,
            layers=layers,
            places=tuple(places),
            frozen=tuple(p for layer in layers for name, p in layer.named_parameters() if "lora_" not in name),
            pointers=tuple((p, p.data_ptr()) for p in matrices),
        )

    def changed(self) -> str | None:
        """What is not as it was, so that the engine must not run now; None when all is."""
        if len(self.holder) != len(self.layers):  # type: ignore[arg-type]
            return "its layers were exchanged"
        for now, layer in zip(self.holder, self.layers, strict=True):  # type: ignore[call-overload]
            if now is not layer:
                return "its layers were exchanged"
            if layer._forward_hooks or layer._forward_pre_hooks:
                return "a hook watches its layers"
        for parameter, address in self.pointers:
            if parameter.data_ptr() != address:
                return "its weights have moved since the engine was built"
        if any(parameter.requires_grad for parameter in self.frozen):
            return "something besides the adapters that it was built with is trained inside the layers"
        for place in self.places:
            reason = _changed(place)
            if reason is not None:
                return reason
        return None


def _places(layer: Any, wanted: set[int]) -> list[Place]:
    return [
        Place(
            parent=parent, name=name, module=module, base=base_of(module),
            active=module.active_adapters[0] if is_adapted(module) else None, adapter=adapted(module),
        )
        for parent in (layer.self_attn, layer.mlp)
        for name, module in parent._modules.items()
        if id(module) in wanted
    ]  # fmt: skip


def _changed(place: Place) -> str | None:
    """Runs for every projection at every forward, so what is usual is asked first and briefly."""
    if place.parent._modules[place.name] is not place.module:
        return "another module is in the place of a projection, such as an adapter put on it since the engine was built"
    if place.base._forward_hooks or place.base._forward_pre_hooks:
        return "a hook watches its projections"
    if place.active is None or _as_it_was(place, place.module, place.active):
        return None
    return adapter_obstacle(place.module) or "another adapter is active than when the engine was built"


def _as_it_was(place: Place, module: Any, name: str) -> bool:
    if module.disable_adapters or module.merged or module.active_adapters != [name]:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    children, was = module._modules, place.adapter
    a, b, dropout = (children[kind]._modules.get(name) for kind in ("lora_A", "lora_B", "lora_dropout"))
    if a is None or b is None or type(dropout) is not nn.Identity:
        return False
    return a.weight is was.a and b.weight is was.b and module.scaling[name] == was.scale
