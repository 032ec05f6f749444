"""The training forward of a causal language model whose decoder layers are ``decoder_layer``: from token ids to loss.

Legend: T tokens (all rows one after the other), H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dropforge_kernels.modules.adapters import Casts
from dropforge_kernels.modules.decoder_layer import decoder_layer
from dropforge_kernels.modules.layer import Frame, Layer
from dropforge_kernels.modules.policy import Keep
from dropforge_kernels.modules.weights import Scratch
from dropforge_kernels.ops.packed_attention import Bounds, document_bounds

if TYPE_CHECKING:
    from dropforge_kernels.modules.offload import HostStore

Tables = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch as the model's forward got it."""

    embeds: torch.Tensor
    """(T, H), as the embedding module gave them, the model's own factor included."""
    positions: torch.Tensor
    """(1, T)."""
    rows: int
    cu_seqlens: torch.Tensor | None
    """int32, where packed documents start and end; None for dense rows of one document each."""


@dataclass(kw_only=True)
class Decoder:
    """The layers of one model, ready to train."""

    layers: Sequence[Layer]
    casts: Casts
    tables: Callable[[torch.Tensor], Tables]
    """(1, T) positions -> each layer kind's cos and sin (T, pairs), fp32."""
    dtype: torch.dtype
    policies: list[Keep]
    scratch: Scratch | None = None
    mlp_tile: int | None = None
    store: HostStore | None = None

    def set_policies(
        self, policies: Sequence[Keep], *, mlp_tile: int | None = None, store: HostStore | None = None
    ) -> None:
        """What each layer keeps, from the next forward on.

        policies: of ``Keep``, or their texts. Raises ValueError for an unknown text, a list of another length, a tile
        of less than one row, and for those that keep something on the host without a store.
        """
        known = [str(keep) for keep in Keep]
        unknown = [policy for policy in policies if str(policy) not in known]
        if unknown:
            raise ValueError(f"policies must be of {', '.join(known)}; received {unknown[0]!r}")
        policies = [Keep(policy) for policy in policies]
        if mlp_tile is not None and mlp_tile < 1:
            raise ValueError(f"mlp_tile must be at least one row, or None for all; received {mlp_tile}")
        if len(policies) != len(self.layers):
            raise ValueError(f"policies must have {len(self.layers)} entries, one per layer; received {len(policies)}")
        if store is None and any(keep.on_host for keep in policies):
            raise ValueError("policies: those that keep something on the host need a store; received None")
        self.policies, self.mlp_tile, self.store = list(policies), mlp_tile, store

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm: (T, H) in the compute dtype."""
        self.casts.refresh()
        if self.scratch is not None:
            # A captured graph must not count on what an earlier forward left in the buffer.
            self.scratch.owner = None
        frame = Frame(
            tables=self.tables(batch.positions), rows=batch.rows, bounds=self._bounds(batch), mlp_tile=self.mlp_tile
        )
        x = batch.embeds.to(self.dtype)
        if self.store is not None:
            self.store.clear()
        for layer, keep in zip(self.layers, self.policies, strict=True):
            x = decoder_layer(x, layer, frame, keep=keep, store=self.store)
        return x

    def _bounds(self, batch: Batch) -> Bounds | None:
        tokens = batch.positions.numel()
        edges = batch.cu_seqlens
        if edges is None:
            if all(layer.attention.softcap is None for layer in self.layers):
                return None
            edges = torch.arange(0, tokens + 1, tokens // batch.rows, dtype=torch.int32, device=batch.positions.device)
        return document_bounds(edges, tokens, validate=False)
