"""Gated MLP forwards. The projections are called as modules, so adapters and quantised layers run in their place."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from dropforge_kernels.ops import geglu, swiglu, swiglu_packed
from dropforge_kernels.patch.spec import Forward


def needs_silu(module: nn.Module) -> str | None:
    """The activation must be SiLU."""
    found = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    silu = (nn.SiLU, type(ACT2FN["silu"]))
    return None if isinstance(found, silu) else f"its activation is {type(found).__name__}, not SiLU"


def needs_tanh_gelu(module: nn.Module) -> str | None:
    """The activation must be GELU with the tanh approximation, by the configuration's name of it."""
    name = module.config.hidden_activation
    return None if name == "gelu_pytorch_tanh" else f"its activation is {name}, not gelu_pytorch_tanh"


def swiglu_mlp(plain: Forward) -> Forward:
    """down(silu(gate(x)) * up(x))."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


def packed_swiglu_mlp(plain: Forward) -> Forward:
    """The same with gate and up in one projection."""

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu_packed(self.gate_up_proj(hidden_states)))

    return forward


def geglu_mlp(plain: Forward) -> Forward:
    """down(gelu_tanh(gate(x)) * up(x))."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), approximate="tanh"))

    return forward
