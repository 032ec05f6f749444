"""What a hand-written decoder layer is made of, and what one forward of the model tells all its layers.

Legend: T tokens of the batch, H hidden width, I width of the MLP, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dropforge_kernels.modules.norm import Norm
from dropforge_kernels.modules.projection import Group
from dropforge_kernels.ops import attention, qk_norm_rope, rope


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
    """Rows of a dense batch of equally long rows; 1 with cu_seqlens."""
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    mlp_tile: int | None = None
    """Rows of the MLP computed at a time; None = all."""


def attend(shape: AttentionShape, qkv: torch.Tensor, frame: Frame) -> torch.Tensor:
    """qkv (T, (heads + 2 groups) D) -> attention's output (T, heads D), differentiable.

    Without head norms q and k are rotated in qkv's own memory: the caller must not need the unrotated ones.
    """
    tokens = qkv.shape[0]
    parts = qkv.view(tokens, shape.heads + 2 * shape.groups, shape.width)
    q, k, v = parts.split((shape.heads, shape.groups, shape.groups), dim=1)
    cos, sin = frame.tables[shape.angles]
    if shape.q_norm is not None and shape.k_norm is not None:
        norm = shape.q_norm
        q, k = qk_norm_rope(
            q, k, norm.weight, shape.k_norm.weight, cos, sin, eps=norm.eps, offset=norm.offset, rounding=norm.rounding
        )
    else:
        q, k = rope(q, k, cos, sin, inplace=True)
    if frame.cu_seqlens is None:
        q, k, v = (t.reshape(frame.rows, tokens // frame.rows, *t.shape[1:]) for t in (q, k, v))
    out = attention(
        q, k, v, scale=shape.scale, window=shape.window, softcap=shape.softcap,
        cu_seqlens=frame.cu_seqlens, max_seqlen=frame.max_seqlen, validate=False,
    )  # fmt: skip
    return out.reshape(tokens, shape.heads * shape.width)
