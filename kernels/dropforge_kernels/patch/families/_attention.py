"""Attention forwards whose rotation (and norm of q and k) is one launch; the attention itself stays the model's choice.

Legend: B batch, S tokens of a sequence, H heads, D head width, P rotated pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dropforge_kernels.ops import qk_norm_rope, rope
from dropforge_kernels.patch.spec import Forward

Rotate = Callable[[nn.Module, torch.Tensor, torch.Tensor, "Tables"], tuple[torch.Tensor, torch.Tensor]]
"""(attention module, q (B, S, H, D), k (B, S, H, D), tables) -> rotated (q, k)."""

Extra = Callable[[nn.Module], dict[str, Any]]
"""Keyword arguments that a family hands to its attention function beside the usual ones."""


class Tables(NamedTuple):
    """cos and sin as ``ops.rope`` wants them: (N, P), each angle once."""

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None
    """(B, S) row of each token, when the batch shares one sequence of angles."""


class TableCache:
    """All layers of a forward get the same cos and sin objects; their tables are cut once, not once per layer."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, int, Tables] | None = None

    def of(self, cos: torch.Tensor, sin: torch.Tensor, batch: int) -> Tables:
        """cos, sin: (1 or B, S, 2 P), the angles twice, as transformers' rotary embeddings give them."""
        last = self._last
        # Holding the tensor itself makes `is` safe: its identity cannot be given to another one meanwhile.
        if last is not None and last[0] is cos and last[1] == batch:
            return last[2]
        pairs = cos.shape[-1] // 2
        flat_cos, flat_sin = (table[..., :pairs].reshape(-1, pairs) for table in (cos, sin))
        positions = None
        if cos.shape[0] != batch:
            positions = torch.arange(cos.shape[1], device=cos.device).expand(batch, -1)
        tables = Tables(flat_cos, flat_sin, positions)
        self._last = (cos, batch, tables)
        return tables


def plain_rope(self: nn.Module, q: torch.Tensor, k: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation alone."""
    return rope(q, k, tables.cos, tables.sin, positions=tables.positions)


def llama_qk_norm_rope(
    self: nn.Module, q: torch.Tensor, k: torch.Tensor, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama-style norm of every head, then the rotation."""
    return qk_norm_rope(
        q, k, self.q_norm.weight, self.k_norm.weight, tables.cos, tables.sin,
        eps=self.q_norm.variance_epsilon, positions=tables.positions,
    )  # fmt: skip


def gemma_qk_norm_rope(
    self: nn.Module, q: torch.Tensor, k: torch.Tensor, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gemma-style norm of every head (weight offset 1, rounded once), then the rotation."""
    return qk_norm_rope(
        q, k, self.q_norm.weight, self.k_norm.weight, tables.cos, tables.sin,
        eps=self.q_norm.eps, offset=1.0, rounding="gemma", positions=tables.positions,
    )  # fmt: skip


def config_window(self: nn.Module) -> dict[str, Any]:
    """One window for all layers (Mistral, Phi-3)."""
    return {"sliding_window": getattr(self.config, "sliding_window", None)}


def layer_window(self: nn.Module) -> dict[str, Any]:
    """A window per layer (Qwen)."""
    return {"sliding_window": self.sliding_window}


def nothing(self: nn.Module) -> dict[str, Any]:
    """No further arguments (Llama, Granite)."""
    return {}


def separate_qkv(self: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of shape (B, S, H, D) from three projections."""
    shape = (*hidden.shape[:-1], -1, self.head_dim)
    return self.q_proj(hidden).view(shape), self.k_proj(hidden).view(shape), self.v_proj(hidden).view(shape)


def joint_qkv(self: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same from one projection (Phi-3)."""
    heads, groups = self.config.num_attention_heads, self.num_key_value_heads
    joint = self.qkv_proj(hidden).view(*hidden.shape[:-1], heads + 2 * groups, self.head_dim)
    q, k, v = joint.split((heads, groups, groups), dim=-2)
    return q, k, v


def attention(
    *, eager: Forward, rotate: Rotate = plain_rope, extra: Extra = nothing, project: Callable[..., Any] = separate_qkv
) -> Callable[[Forward], Forward]:
    """A builder for ``PatchSpec``. eager: the family's own attention function of that name."""

    def build(plain: Forward) -> Forward:
        cache = TableCache()

        def forward(
            self: nn.Module,
            hidden_states: torch.Tensor,
            position_embeddings: tuple[torch.Tensor, torch.Tensor],
            attention_mask: torch.Tensor | None = None,
            past_key_values: Any = None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            q, k, v = project(self, hidden_states)
            cos, sin = position_embeddings
            q, k = rotate(self, q, k, cache.of(cos, sin, q.shape[0]))
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
            dropout = self.attention_dropout if self.training else 0.0
            out, weights = attend(
                self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **extra(self), **kwargs
            )
            return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

        return forward

    return build
