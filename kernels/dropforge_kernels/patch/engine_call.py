"""From the arguments of a causal language model's forward to the engine's batch, or back to the model's own path.

Rows with padding and rows that hold several documents become one packed row: no token is computed that nobody needs,
and no document sees another. Finding that out from masks and positions waits for the GPU; batches that bring
``cu_seq_lens_q`` do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dropforge_kernels.modules.causal_lm import Batch
from dropforge_kernels.modules.policy import Keep

if TYPE_CHECKING:
    from dropforge_kernels.patch.engine import Engine

KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions", "output_hidden_states",
    "return_dict", "logits_to_keep",
}  # fmt: skip


def final_hidden(engine: Engine, inputs: dict[str, Any]) -> torch.Tensor | None:
    """The normed hidden states (B, S, H) for a training forward, or None when this call is not the engine's."""
    reason = _not_ours(inputs) or engine.obstacle()
    if reason is not None:
        engine.decline(reason)
        return None
    inner = engine.inner
    if not engine.planned:
        # Until somebody plans the memory, transformers' own switch decides.
        keep = Keep.NONE if inner.gradient_checkpointing else Keep.ALL
        engine.decoder.policies = [keep] * len(engine.decoder.layers)
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        embeds = inner.embed_tokens(inputs["input_ids"])
    factor = engine.layout.embedding_factor(inner.config)
    shape = embeds.shape
    flat = embeds.reshape(-1, shape[-1])
    with torch.autocast(flat.device.type, enabled=False):
        batch, kept = _batch(inputs, flat if factor == 1.0 else flat * factor, shape[:2])
        hidden = inner.norm(engine.decoder.hidden(batch))
        if kept is not None:
            hidden = hidden.new_zeros(flat.shape[0], shape[-1]).index_copy(0, kept, hidden)
    return hidden.view(shape)


def _not_ours(inputs: dict[str, Any]) -> str | None:
    """Why these arguments need the model's own forward, or None."""
    unknown = sorted(name for name, value in inputs.items() if name not in KNOWN and value is not None)
    if unknown:
        return f"the forward was given {', '.join(unknown)}"
    if inputs.get("past_key_values") is not None:
        return "the forward was given a cache"
    if inputs.get("output_attentions") or inputs.get("output_hidden_states"):
        return "attentions or hidden states were asked for"
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return "the attention mask is not one flag per token"
    return None


def _batch(inputs: dict[str, Any], embeds: torch.Tensor, shape: torch.Size) -> tuple[Batch, torch.Tensor | None]:
    """(batch, the tokens it holds when padding was left out)."""
    rows, length = shape
    positions = inputs.get("position_ids")
    cu_seqlens, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if cu_seqlens is not None:
        return Batch(embeds=embeds, positions=positions.reshape(1, -1), rows=1, cu_seqlens=cu_seqlens), None
    given = positions is not None
    if positions is None:
        positions = torch.arange(length, device=embeds.device).expand(rows, -1)
    positions = positions.expand(rows, -1).reshape(-1)
    kept = None
    if mask is not None and not bool(mask.all()):
        kept = mask.reshape(-1).nonzero().flatten()
    if kept is None and not (given and _restarts(positions.view(rows, length))):
        return Batch(embeds=embeds, positions=positions[None], rows=rows, cu_seqlens=None), None
    starts = _starts(positions.view(rows, length)).reshape(-1)
    if kept is not None:
        # A document whose first tokens are padding begins at its first token that is kept.
        document = starts.cumsum(0)[kept]
        embeds, positions = embeds[kept], positions[kept]
        starts = torch.ones_like(document, dtype=torch.bool)
        starts[1:] = document[1:] != document[:-1]
    edges = torch.cat([starts.nonzero().flatten(), starts.new_full((1,), starts.numel(), dtype=torch.int64)])
    return Batch(embeds=embeds, positions=positions[None], rows=1, cu_seqlens=edges.to(torch.int32)), kept


def _starts(positions: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: where a document begins: at the start of a row, and where positions do not go on by one."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts


def _restarts(positions: torch.Tensor) -> bool:
    return bool(_starts(positions)[:, 1:].any())
