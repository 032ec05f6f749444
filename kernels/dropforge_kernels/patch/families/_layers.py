"""How the modules of a family's decoder layer map onto ``dropforge_kernels.modules``: names, norms, shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dropforge_kernels.modules.layer import AttentionShape
from dropforge_kernels.modules.norm import Norm


@dataclass(frozen=True, kw_only=True)
class LayerModules:
    """One decoder layer's modules and constants. The projections may be plain, quantised, or wrapped by PEFT."""

    attention: AttentionShape
    activation: str
    input_norm: Norm
    mlp_norm: Norm
    attention_end: Norm | None
    mlp_end: Norm | None
    multiplier: float
    qkv: tuple[nn.Module, ...]
    o: nn.Module
    gate_up: tuple[nn.Module, ...]
    down: nn.Module


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One family."""

    norm: Callable[[nn.Module], Norm]
    activation: str = "silu"
    windowed: Callable[[nn.Module], int | None] = lambda attention: None
    softcap: Callable[[nn.Module], float | None] = lambda attention: None
    head_norms: bool = False
    end_norms: bool = False
    joint: bool = False
    """q, k, v in one projection, gate and up in another."""
    multiplier: Callable[[nn.Module], float] = lambda layer: 1.0
    embedding_factor: Callable[[Any], float] = lambda config: 1.0
    angles: Callable[[Any, int], str] = lambda config, index: ""
    """Which rotation a layer uses, by its index: "" where the model has one."""

    def modules(self, layer: Any, index: int) -> LayerModules:
        """The parts of one transformers decoder layer."""
        attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
        shape = AttentionShape(
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            width=attention.head_dim,
            scale=attention.scaling,
            window=self.windowed(attention),
            softcap=self.softcap(attention),
            q_norm=self.norm(attention.q_norm) if self.head_norms else None,
            k_norm=self.norm(attention.k_norm) if self.head_norms else None,
            angles=self.angles(config, index),
        )
        return LayerModules(
            attention=shape,
            activation=self.activation,
            input_norm=self.norm(layer.input_layernorm),
            mlp_norm=self.norm(layer.pre_feedforward_layernorm if self.end_norms else layer.post_attention_layernorm),
            attention_end=self.norm(layer.post_attention_layernorm) if self.end_norms else None,
            mlp_end=self.norm(layer.post_feedforward_layernorm) if self.end_norms else None,
            multiplier=self.multiplier(layer),
            qkv=(attention.qkv_proj,) if self.joint else (attention.q_proj, attention.k_proj, attention.v_proj),
            o=attention.o_proj,
            gate_up=(mlp.gate_up_proj,) if self.joint else (mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
        )

    def tables(self, model: Any, positions: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin (T, pairs) in fp32 for (1, T) positions, each angle once, for every kind of layer."""
        config = model.config
        kinds = {self.angles(config, index) for index in range(config.num_hidden_layers)}
        # The rotary modules answer in the dtype of their first argument and read nothing else from it.
        wide = torch.empty(0, dtype=torch.float32, device=positions.device)
        tables = {}
        for kind in kinds:
            cos, sin = model.rotary_emb(wide, positions, *([kind] if kind else []))
            pairs = cos.shape[-1] // 2
            tables[kind] = (cos[0, :, :pairs].contiguous(), sin[0, :, :pairs].contiguous())
        return tables


def llama_norm(module: Any) -> Norm:
    """Norms with ``variance_epsilon`` that round before the weight."""
    return Norm(weight=module.weight.detach(), eps=module.variance_epsilon)


def gemma_norm(module: Any) -> Norm:
    """Norms with ``eps`` whose weight is an offset from 1 and that round once."""
    return Norm(weight=module.weight.detach(), eps=module.eps, offset=1.0, rounding="gemma")


def _config_window(attention: Any) -> int | None:
    return getattr(attention.config, "sliding_window", None)


def _layer_window(attention: Any) -> int | None:
    window: int | None = attention.sliding_window
    return window


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(norm=llama_norm),
    "mistral": Layout(norm=llama_norm, windowed=_config_window),
    "qwen2": Layout(norm=llama_norm, windowed=_layer_window),
    "qwen3": Layout(norm=llama_norm, windowed=_layer_window, head_norms=True),
    "gemma2": Layout(
        norm=gemma_norm,
        activation="gelu_tanh",
        windowed=_layer_window,
        softcap=lambda attention: attention.attn_logit_softcapping,  # type: ignore[no-any-return, union-attr]
        end_norms=True,
    ),
    "gemma3_text": Layout(
        norm=gemma_norm,
        activation="gelu_tanh",
        windowed=_layer_window,
        head_norms=True,
        end_norms=True,
        angles=lambda config, index: config.layer_types[index],
    ),
    "phi3": Layout(norm=llama_norm, windowed=_config_window, joint=True),
    "granite": Layout(
        norm=llama_norm,
        multiplier=lambda layer: layer.residual_multiplier,  # type: ignore[return-value]
        embedding_factor=lambda config: config.embedding_multiplier,
    ),
}
"""transformers' model type -> how its decoder layers are built."""
