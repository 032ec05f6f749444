"""Decoder layers through torch.compile, one by one: what is left when a step cannot be captured.

A layer compiled has far fewer launches than one run operation by operation, and that is what a captured step saves
most. Everything between the layers stays as it is. Hand-written layers are one function each already: there is nothing
in them to compile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BACKEND: str | Callable[..., Any] = "inductor"


class LayerCompiler:
    """Switches compilation of a model's decoder layers on and off; off leaves the layers as they were.

    Args:
        model: any; its decoder layers are the longest list of modules of one class.
        why_not: why there is nothing to gain; compilation then stays off.
        backend: of torch.compile; None: BACKEND.
    """

    def __init__(self, model: nn.Module, *, why_not: str = "", backend: str | Callable[..., Any] | None = None) -> None:
        self.layers = decoder_layers(model)
        self.why_not = why_not or ("" if self.layers else "the model has no list of equal layers")
        self.backend = BACKEND if backend is None else backend
        self.on = False

    def switch_on(self) -> bool:
        """Whether the layers are compiled from their next call on."""
        if self.why_not or self.on:
            return self.on
        for layer in self.layers:
            # The first shape gets code of its own; from the second on lengths are variables, so that a handful of
            # bucket sizes does not mean as many compilations.
            layer._compiled_call_impl = torch.compile(layer._call_impl, backend=self.backend)
        self.on = True
        return True

    def switch_off(self, why_not: str = "") -> None:
        """Layers run as they are again. why_not: keeps it so."""
        self.why_not = why_not or self.why_not
        if self.on:
            for layer in self.layers:
                layer._compiled_call_impl = None
        self.on = False


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of at least two modules of one class in a model; empty when there is none."""
    lists = (list(module) for module in model.modules() if isinstance(module, nn.ModuleList))
    equal = (layers for layers in lists if len(layers) > 1 and len({type(layer) for layer in layers}) == 1)
    return max(itertools.chain(equal, [[]]), key=len)
