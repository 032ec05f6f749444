"""Attention over rows of many short documents, against FlashAttention's variable-length kernel on the same row.

Legend: T packed tokens, H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from _cases import both_directions, randn
from attention import GEMMA, LLAMA, QWEN, flops
from runner import Case, Shape

TOKENS = 16384
# (model, lengths of the documents in turn, options)
POINTS = (
    *((shape, (length,), {}) for shape in (LLAMA, QWEN) for length in (128, 256, 512, 2048)),
    (QWEN, (60, 200, 340), {}),  # conversations: documents of different length, with the longest one as flash's bound
    (GEMMA, (512,), {"softcap": 50.0}),
)


def _check(shape: Shape, options: dict) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    edges = torch.tensor([0, 60, 260, 300], dtype=torch.int32, device="cuda")
    given = {
        name: torch.randn(300, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
    }
    bounds = ops.document_bounds(edges, 300)
    ours = partial(ops.packed_attention, bounds=bounds, **options)
    assert_parity(ours, partial(reference.packed_attention, bounds=bounds, **options), given, grad=("q", "k", "v"))


def _edges(lengths: tuple[int, ...]) -> list[int]:
    edges = [0]
    while edges[-1] < TOKENS:
        edges.append(min(TOKENS, edges[-1] + lengths[(len(edges) - 1) % len(lengths)]))
    return edges


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points; only the base process takes part."""
    if "ours" not in engines:
        return
    from dropforge_kernels import ops

    for shape, lengths, options in POINTS:
        edges = _edges(lengths)
        ends = torch.tensor(edges, dtype=torch.int32, device="cuda")
        bounds = ops.document_bounds(ends, TOKENS)
        tensors = [randn(TOKENS, n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        packed = {"cu_seqlens": ends, "max_seqlen": max(lengths), "validate": False}
        backend = "flex" if options else "flash"
        providers = {
            "ours": partial(ops.packed_attention, bounds=bounds, **options),
            backend: partial(ops.attention, backend=backend, **packed, **options),
        }
        work = sum(flops(shape, b - a, b - a, None) for a, b in zip(edges, edges[1:], strict=False))
        yield from both_directions(
            f"packed_attention {'+'.join(map(str, lengths))}", shape, TOKENS, providers, tensors,
            forward_flops=work, backward_flops=work * 5 // 2, check=partial(_check, shape, options),
        )  # fmt: skip
