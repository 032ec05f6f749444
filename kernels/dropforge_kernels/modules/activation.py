"""Gated activations of a packed (T, 2 I) tensor for hand-written layers: forward, and a backward that needs no memory.

h = act(gate) * up with gate the first I columns and up the others; act: "silu" or "gelu_tanh".
"""

from __future__ import annotations

import torch

from dropforge_kernels import reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._glu import GELU_TANH, SILU, launch_backward, launch_forward

ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH}


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """h (T, I)."""
    gate, up = gate_up.chunk(2, -1)
    if choose("gated", gate_up).backend is Backend.REFERENCE:
        return _reference(gate, up, activation)
    return launch_forward(gate, up, ACTIVATIONS[activation])


def gated_backward(dh: torch.Tensor, gate_up: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of gate_up, in gate_up's own memory; h, in dh's own memory). dh: (T, I), contiguous."""
    gate, up = gate_up.chunk(2, -1)
    if choose("gated_backward", dh, gate_up).backend is not Backend.REFERENCE:
        launch_backward(dh, gate, up, gate, up, ACTIVATIONS[activation], product=dh)
        return gate_up, dh
    with torch.enable_grad():
        leaf = gate_up.detach().clone().requires_grad_()
        h = _reference(*leaf.chunk(2, -1), activation)
    (d_gate_up,) = torch.autograd.grad(h, leaf, dh)
    return gate_up.copy_(d_gate_up), dh.copy_(h.detach())


def _reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return reference.swiglu(gate, up)
    return reference.geglu(gate, up, approximate="tanh")
