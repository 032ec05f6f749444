"""The attention backends against each other: what the order of preference in ops/attention.py rests on.

Providers here are backends by name, so "ours" is the one that the table chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from _cases import both_directions, randn
from runner import Case, Shape

LLAMA = Shape("llama-8b", 4096, 14336, 32, 8, 128, 0)
QWEN = Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 0)
GPT_OSS = Shape("gpt-oss-20b", 2880, 2880, 64, 8, 64, 0)
GEMMA = Shape("gemma-3-4b", 2560, 10240, 8, 4, 256, 0)

# (name, model, tokens, document length or None for dense, options, backends)
POINTS = [
    *((f"packed {d}", LLAMA, 16384, d, {}, ("flash", "flex")) for d in (256, 512, 2048, 8192)),
    ("window 1024", GEMMA, 16384, 8192, {"window": 1024}, ("flash", "flex")),
    ("sinks window 128", GPT_OSS, 16384, 4096, {"window": 128}, ("flash", "flex")),
    ("sinks", GPT_OSS, 16384, 4096, {}, ("flash", "flex")),
    ("softcap", GEMMA, 8192, 4096, {"softcap": 50.0}, ("flex",)),
    ("plain 256-wide heads", GEMMA, 8192, None, {}, ("flash", "flex")),
    *((f"dense {n}", LLAMA, n, None, {}, ("cudnn", "flash", "flex")) for n in (2048, 8192, 32768)),
    *((f"dense {n}", QWEN, n, None, {}, ("cudnn", "flash", "flex")) for n in (2048, 8192, 32768)),
]


def flops(shape: Shape, tokens: int, document: int, window: int | None) -> int:
    """Of the forward's two products over the visible half of the scores; backward has five products: 2.5 times
    that.
    """
    visible = sum(min(i + 1, window or document) for i in range(document)) * (tokens // document)
    return 4 * visible * shape.heads * shape.head_dim


def with_fa4(backends: tuple[str, ...]) -> tuple[str, ...]:
    """And FlashAttention 4 where it can run."""
    from dropforge_kernels.ops.attention import fa4_missing

    return backends if fa4_missing() else (*backends, "fa4")


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points; only the base process takes part."""
    if "ours" not in engines:
        return
    from dropforge_kernels import ops

    for name, shape, tokens, document, options, listed in POINTS:
        backends = with_fa4(listed)
        torch._dynamo.reset()  # each point compiled for its own sizes, as a training run with one bucket is
        lead = (1, tokens) if document is None else (tokens,)
        tensors = [randn(*lead, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        extra: dict = {"validate": False}
        sinks = None
        if name.startswith("sinks"):
            sinks = randn(shape.heads, grad=False)
        if document is not None:
            ends = torch.arange(0, tokens + 1, document, dtype=torch.int32, device="cuda")
            extra |= {"cu_seqlens": ends, "max_seqlen": document}
        mask = ops.block_mask(tokens, device="cuda", cu_seqlens=extra.get("cu_seqlens"), window=options.get("window"))
        call = partial(_call, options=options | extra, sinks=sinks, mask=mask)
        work = flops(shape, tokens, document or tokens, options.get("window"))
        providers = {"ours": partial(call, None)} | {b: partial(call, b) for b in backends}
        yield from both_directions(
            f"attention {name}", shape, tokens, providers, tensors, forward_flops=work, backward_flops=work * 5 // 2
        )


def _call(backend, q, k, v, *, options, sinks, mask):
    from dropforge_kernels import ops

    return ops.attention(q, k, v, backend=backend, sinks=sinks, mask=mask, **options)
