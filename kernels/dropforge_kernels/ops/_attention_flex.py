"""Flex attention: any mask and any change of the scores, compiled to Triton by torch. The choice for soft-capped
scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128


@lru_cache(maxsize=1)
def _compiled() -> Callable:
    """flex_attention, compiled once per process. A second number of tokens makes the compiler treat it as variable.

    fullgraph: past the compiler's limit of variants it must raise, because in eager it silently builds the whole
    score matrix.
    """
    return torch.compile(flex_attention, fullgraph=True)


def _block_tables(
    tokens: int, document: torch.Tensor | None, device: torch.device | str, *, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks with some visible pair but not all, blocks with all pairs visible), (Q, Q) booleans each.

    Documents follow each other, so two blocks share one exactly when the earlier block's last token and the later
    one's first are of one document, and these two tokens are the nearest pair.
    """
    first = torch.arange(0, tokens, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp_max(tokens - 1)
    query_first, key_first = first[:, None], first[None, :]
    query_last, key_last = last[:, None], last[None, :]
    earlier, later = key_first < query_first, key_first > query_first
    diagonal = ~earlier & ~later
    some = earlier | diagonal if causal else torch.ones_like(diagonal)
    every = earlier.clone() if causal else torch.ones_like(diagonal)
    every &= (query_first + BLOCK <= tokens) & (key_first + BLOCK <= tokens)
    if window is not None:
        nearest = torch.where(earlier, query_first - key_last, torch.where(later, key_first - query_last, 0))
        some &= nearest < window
        every &= torch.maximum(query_last - key_first, key_last - query_first) < window
    if document is not None:
        start, end = document[first], document[last]
        shared = torch.where(earlier, end[None, :] == start[:, None], start[None, :] == end[:, None])
        some &= shared | diagonal
        every &= (start == end)[:, None] & (start == end)[None, :] & (start[:, None] == start[None, :])
    return some & ~every, every


def block_mask(
    tokens: int,
    *,
    device: torch.device | str,
    cu_seqlens: torch.Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
) -> BlockMask:
    """Which 128 x 128 blocks of the score matrix are needed; build it once per batch and pass it to every layer.

    tokens: length of the packed row or of each dense row. cu_seqlens: int32 (documents + 1,), None = one document.
    window: keys a query sees, its own included. The blocks follow from where documents start and end, so the score
    matrix is never looked at, nothing is compiled and nothing waits for the GPU.
    """
    if cu_seqlens is None:
        document = None
    else:
        document = torch.searchsorted(
            cu_seqlens, torch.arange(tokens, device=device, dtype=cu_seqlens.dtype), right=True
        )

    def allowed(batch, head, query, key):
        inside = query >= key if causal else query == query
        if window is not None:
            inside = inside & (query - key < window) & (key - query < window)
        if document is not None:
            inside = inside & (document[query] == document[key])
        return inside

    tables: list[torch.Tensor] = []
    for needed in _block_tables(tokens, document, device, causal=causal, window=window):
        order = torch.argsort(needed.to(torch.int8), dim=-1, descending=True, stable=True)
        tables += (needed.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None])
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(tokens, tokens))


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """q (B, S, H, D), k and v (B, S, G, D); differentiable by flex attention's own backward."""

    def capped(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    run = flex_attention if torch.compiler.is_compiling() else _compiled()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, aux = run(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    out = out.transpose(1, 2)
    if sinks is None:
        return out
    share = torch.sigmoid(aux.lse - sinks.float()[None, :, None]).transpose(1, 2)[..., None]
    return (out * share).to(out.dtype)
