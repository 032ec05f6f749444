"""FlashAttention 4 from the package flash-attn-4, where it is installed: packed rows with windows, caps and sinks.

It compiles a kernel for every combination of dtype, width and options at its first call (2 to 3 seconds each way), so
that call must come before a CUDA graph is captured. Legend: T tokens, H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache(maxsize=1)
def fa4_missing() -> str | None:
    """Why FlashAttention 4 cannot be used in this process, or None."""
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "is proven on GPUs of compute capability 9 (Hopper) only"
    return None


def fa4_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """q (T, H, D), k and v (T, G, D), bf16 or fp16; window counts the query's own token."""
    from flash_attn.cute import flash_attn_varlen_func

    left = None if window is None else window - 1
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=(left, 0 if causal else left),
        learnable_sink=sinks,
        softcap=softcap or 0.0,
    )
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found
