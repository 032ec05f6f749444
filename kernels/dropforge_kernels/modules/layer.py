"""What a hand-written decoder layer is made of, and what one forward of the model tells all its layers.

Legend: T tokens of the batch, H hidden width, I width of the MLP, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dropforge_kernels.modules.norm import Norm
from dropforge_kernels.modules.projection import Group
from dropforge_kernels.ops.packed_attention import Bounds


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The attention of one layer."""

    heads: int
    groups: int
    width: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    angles: str = ""
    """Which of the frame's tables rotates q and k; models with one table call it ""."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The frozen matrices of one layer in the compute dtype, each group's joined along its outputs."""

    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: y = x + m attention(norm(x)), out = y + m mlp(norm(y)); Gemma norms each branch's end too."""

    attention: AttentionShape
    activation: str
    """A key of ``activation.ACTIVATIONS``."""
    input_norm: Norm
    mlp_norm: Norm
    attention_end: Norm | None
    mlp_end: Norm | None
    multiplier: float
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    weights: Callable[[], Weights]
    """Gives the matrices; those of a quantised layer are valid until the next layer asks for its own."""
    parameters: tuple[torch.nn.Parameter, ...]
    """The adapters' A and B of qkv, o, gate_up, down, in the order of the groups' parts."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What one forward of the model tells all its layers."""

    tables: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """cos and sin (T, pairs) of each token, fp32, by AttentionShape.angles."""
    rows: int
    """Rows of a dense batch of equally long rows; 1 when documents are packed."""
    bounds: Bounds | None = None
    """Where each token's document begins and ends; None for dense rows without capped scores."""
    mlp_tile: int | None = None
    """Rows of the MLP computed at a time; None = all."""
