"""Flex attention: any mask and any change of the scores, compiled to Triton by torch. The choice for soft-capped
scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable, Callable]:
    """(flex_attention, create_block_mask), compiled once per process.

    flex_attention: a second number of tokens makes the compiler treat it as variable. fullgraph: past the compiler's
    limit of variants it must raise, because in eager it silently builds the whole score matrix. create_block_mask:
    static sizes, because torch 2.11 did not finish compiling the other form for 16,384 tokens; past the limit it runs
    in eager, slower.
    """
    return torch.compile(flex_attention, fullgraph=True), torch.compile(create_block_mask, dynamic=False)


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
    window: keys a query sees, its own included.
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

    make = create_block_mask if torch.compiler.is_compiling() else _compiled()[1]
    return make(allowed, None, None, tokens, tokens, device=device)


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

    run = flex_attention if torch.compiler.is_compiling() else _compiled()[0]
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
