"""Decoder layers through torch.compile, one by one: what is left when a step cannot be captured.

A layer compiled has far fewer launches than one run operation by operation, and that is what a captured step saves
most. Everything between the layers stays as it is, and so does attention, whose kernels the compiler must not look
into. Hand-written layers are one function each already: there is nothing in them to compile.

Compilers err. So the first compiled run of every shape is checked against the same run without (``difference``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from dropforge_kernels.patch.attention_interface import NAME, attention_forward
from torch import nn
from transformers import AttentionInterface

from dropforge.fast_step.obstacles import has_dropout

BACKEND: str | Callable[..., Any] = "inductor"

LOSS_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 5e-2
"""Relative. Another order of roundings in bf16 stays well below both."""
RANDOM_LOSS_TOLERANCE = 0.2
"""With dropout two runs differ anyway: the loss must then be about as large, and the gradient within a factor of 2."""


class LayerCompiler:
    """Compiled versions of a model's decoder layers, switched on and off; off leaves the layers as they were.

    Args:
        model: any; its decoder layers are the longest list of modules of one class.
        why_not: why there is nothing to gain; compilation then stays off.
        backend: of torch.compile; None: BACKEND.
    """

    def __init__(self, model: nn.Module, *, why_not: str = "", backend: str | Callable[..., Any] | None = None) -> None:
        self.layers = decoder_layers(model)
        self.why_not = why_not or ("" if self.layers else "the model has no list of equal layers")
        self.backend = BACKEND if backend is None else backend
        self.random = has_dropout(model)
        self.on = False
        self._compiled: list[Any] = []
        self._opaque: Any = None

    def switch(self, on: bool) -> None:
        """Compiled from the next call on, unless there is a reason why not; or as they were."""
        on = on and not self.why_not
        if on == self.on:
            return
        if on and not self._compiled:
            # The first shape gets code of its own; from the second on lengths are variables, so that a handful of
            # bucket sizes does not mean as many compilations.
            self._compiled = [torch.compile(layer._call_impl, backend=self.backend) for layer in self.layers]
            self._opaque = torch.compiler.disable(attention_forward)
        for layer, compiled in zip(self.layers, self._compiled, strict=True):
            layer._compiled_call_impl = compiled if on else None
        AttentionInterface.register(NAME, self._opaque if on else attention_forward)
        self.on = on

    def give_up(self, why_not: str) -> None:
        """Off for good."""
        self.switch(False)
        self.why_not = why_not

    def difference(self, eager: Sequence[torch.Tensor], compiled: Sequence[torch.Tensor]) -> str:
        """Empty, or in what a compiled run differs from the eager one. Each: gradients, and the loss (0-d) last."""
        *grads, loss = eager
        *others, other = compiled
        allowed = RANDOM_LOSS_TOLERANCE if self.random else LOSS_TOLERANCE
        if not float((other - loss).abs()) <= allowed * float(loss.abs()):  # not: NaN is no number of any size
            return f"the loss is {float(other):.5f} instead of {float(loss):.5f}"
        for grad, compared in zip(grads, others, strict=True):
            size = float(torch.linalg.vector_norm(grad, dtype=torch.float32))
            away = float(torch.linalg.vector_norm(compared.float() - grad.float()))
            if self.random:
                ratio = float(torch.linalg.vector_norm(compared, dtype=torch.float32)) / max(size, 1e-30)
                if not 0.5 <= ratio <= 2.0:
                    return f"the gradient's norm is {ratio:.2f} times as large"
            elif not away <= GRADIENT_TOLERANCE * size:
                return f"the gradient is {away / max(size, 1e-30):.3f} of its norm away"
        return ""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of at least two modules of one class in a model; empty when there is none."""
    lists = (list(module) for module in model.modules() if isinstance(module, nn.ModuleList))
    equal = (layers for layers in lists if len(layers) > 1 and len({type(layer) for layer in layers}) == 1)
    return max(itertools.chain(equal, [[]]), key=len)
