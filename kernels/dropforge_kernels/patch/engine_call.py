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

TILE = 2048
"""Rows of the MLP at a time where tiles are asked for and nobody plans."""
KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions", "output_hidden_states",
    "return_dict", "logits_to_keep",
}  # fmt: skip


def final_hidden(engine: Engine, inputs: dict[str, Any]) -> torch.Tensor | None:
    """The normed hidden states (B, S, H) for a training forward, or None when this call is not the engine's.

    Raises ValueError: a mask or positions of another shape than the tokens.
    """
    reason = _not_ours(inputs) or engine.obstacle()
    if reason is not None:
        engine.decline(reason)
        return None
    inner = engine.inner
    if not engine.planned:
        # Until somebody plans the memory, transformers' own switch decides.
        keep = Keep.NONE if inner.gradient_checkpointing else Keep.ATTENTION if engine.tiled_mlp else Keep.ALL
        engine.decoder.policies = [keep] * len(engine.decoder.layers)
        engine.decoder.mlp_tile = TILE if engine.tiled_mlp else None
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        embeds = inner.embed_tokens(inputs["input_ids"])
    factor = engine.layout.embedding_factor(inner.config)
    shape = embeds.shape
    _check_length(engine, inputs, shape[1])
    check_shape("attention_mask", inputs.get("attention_mask"), shape[:2])
    check_shape("position_ids", inputs.get("position_ids"), shape[:2], shared=True)
    flat = embeds.reshape(-1, shape[-1])
    with torch.autocast(flat.device.type, enabled=False):
        batch, kept = _batch(inputs, flat if factor == 1.0 else flat * factor, shape[:2])
        if batch.embeds.shape[0] == 0:
            engine.decline("the batch has no token")
            return None
        hidden = inner.norm(engine.decoder.hidden(batch))
        if kept is not None:
            hidden = hidden.new_zeros(flat.shape[0], shape[-1]).index_copy(0, kept, hidden)
    return hidden.view(shape)


def _check_length(engine: Engine, inputs: dict[str, Any], length: int) -> None:
    """A word about rows that run on beyond what the model knows; packed rows are as long as they like."""
    limit = getattr(engine.inner.config, "max_position_embeddings", None)
    counted = inputs.get("cu_seq_lens_q") is None and inputs.get("position_ids") is None
    if limit is not None and length > limit and counted:
        engine.warn(
            "length",
            f"input_ids: rows of {length:,} tokens, but this model knows {limit:,} positions; those it never saw come "
            f"out as noise: load it with rope_scaling, or train on shorter rows",
        )


def check_shape(name: str, given: Any, shape: torch.Size, *, shared: bool = False) -> None:
    """Raises ValueError when the argument ``name`` is not (B, S), or (1, S) if ``shared``."""
    if given is None or given.shape == shape or (shared and given.shape == (1, shape[1])):
        return
    raise ValueError(
        f"{name} must have the shape of input_ids, {tuple(shape)}; received {tuple(given.shape)}: give both from one "
        f"tokenised batch"
    )


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
    given = positions is not None
    if positions is None:
        positions = torch.arange(length, device=embeds.device)[None]
    positions = positions.expand(rows, -1).reshape(-1)
    if cu_seqlens is not None:
        return Batch(embeds=embeds, positions=positions[None], rows=1, cu_seqlens=cu_seqlens), None
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
