"""Packed documents: against FlashAttention's variable-length kernel and flex attention on the same row.

Documents like those of alpaca (short, of very different length), of one length, and one document a row.
Legend: T packed tokens, H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from _cases import both_directions, randn
from attention import GEMMA, LLAMA, QWEN, flops, with_fa4
from runner import Case, Shape

TOKENS = 16384
ALPACA_LONGEST = 2048
# (model, documents: "alpaca" or their common length, options, backends beside ours)
POINTS = (
    *((shape, "alpaca", {}, ("flash", "flex")) for shape in (LLAMA, QWEN, GEMMA)),
    *((LLAMA, length, {}, ("flash", "flex") if length > 512 else ("flash",)) for length in (128, 512, 2048, 8192)),
    *((QWEN, length, {}, ("flash",)) for length in (128, 512, 2048, 16384)),
    (GEMMA, 2048, {}, ("flash",)),
    (GEMMA, 8192, {"window": 1024}, ("flash",)),
    (GEMMA, 512, {"softcap": 50.0}, ("flex",)),
)


@lru_cache(maxsize=16)
def _check(shape: Shape, settings: tuple) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    options = dict(settings)
    edges = torch.tensor([0, 60, 260, 300], dtype=torch.int32, device="cuda")
    given = {
        name: torch.randn(300, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
    }
    bounds = ops.document_bounds(edges, 300)
    ours = partial(ops.packed_attention, bounds=bounds, **options)
    assert_parity(ours, partial(reference.packed_attention, bounds=bounds, **options), given, grad=("q", "k", "v"))


def _edges(documents: str | int) -> list[int]:
    """Where documents start and end. "alpaca": lengths of exp(N(ln 150, 0.75)) from 24 to 2,048, a fixed seed."""
    rng = random.Random(0)
    edges = [0]
    while edges[-1] < TOKENS:
        length = documents
        if documents == "alpaca":
            length = max(24, min(ALPACA_LONGEST, round(math.exp(rng.gauss(math.log(150), 0.75)))))
        edges.append(min(TOKENS, edges[-1] + length))
    return edges


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points; only the base process takes part."""
    if "ours" not in engines:
        return
    from dropforge_kernels import ops

    for shape, documents, options, backends in POINTS:
        torch._dynamo.reset()  # each point compiled for its own sizes, as a training run with one bucket is
        edges = _edges(documents)
        ends = torch.tensor(edges, dtype=torch.int32, device="cuda")
        bounds = ops.document_bounds(ends, TOKENS)
        tensors = [randn(TOKENS, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        longest = ALPACA_LONGEST if documents == "alpaca" else documents
        common = {"cu_seqlens": ends, "max_seqlen": longest, "validate": False, **options}
        mask = ops.block_mask(TOKENS, device="cuda", cu_seqlens=ends, window=options.get("window"))
        providers = {"ours": partial(ops.packed_attention, bounds=bounds, **options)}
        for backend in with_fa4(backends):
            extra = {"mask": mask} if backend == "flex" else {}
            providers[backend] = partial(ops.attention, backend=backend, **common, **extra)
        work = sum(flops(shape, b - a, b - a, options.get("window")) for a, b in zip(edges, edges[1:], strict=False))
        name = f"packed_attention {documents}" + "".join(f" {key} {value:g}" for key, value in options.items())
        yield from both_directions(
            name, shape, TOKENS, providers, tensors,
            forward_flops=work, backward_flops=work * 5 // 2, check=partial(_check, shape, tuple(options.items())),
        )  # fmt: skip
