"""What an engine was built on, compared with the model before every forward: nobody may train what it does not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dropforge_kernels.modules.adapters import Adapted
from dropforge_kernels.patch.engine_projections import adapted, adapter_obstacle, base_of


@dataclass(frozen=True)
class Place:
    """Where a projection hangs, and what was read from it."""

    parent: nn.Module
    name: str
    module: nn.Module
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
        Place(parent, name, module, adapted(module))
        for parent in (layer.self_attn, layer.mlp)
        for name, module in parent._modules.items()
        if id(module) in wanted
    ]


def _changed(place: Place) -> str | None:
    module, was = place.module, place.adapter
    if place.parent._modules[place.name] is not module:
        return "another module is in the place of a projection, such as an adapter put on it since the engine was built"
    base = base_of(module)
    if base._forward_hooks or base._forward_pre_hooks:
        return "a hook watches its projections"
    reason = adapter_obstacle(module)
    if reason is not None:
        return reason
    now = adapted(module)
    if now.a is not was.a or now.b is not was.b or now.scale != was.scale:
        return "another adapter is active than when the engine was built"
    return None
