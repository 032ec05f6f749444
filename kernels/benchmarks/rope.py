"""RoPE of q and k in the layout of a training step: (1, T, H, D) memory, seen by the peers as (1, H, T, D)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from _cases import both_directions, chosen, grid, randn
from runner import Case, Shape


def table(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, D / 2) in bf16, the dtype in which models hand them on."""
    angles = torch.arange(tokens, device="cuda")[:, None] * 10000.0 ** -(
        torch.arange(width // 2, device="cuda") / width
    )
    return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


@lru_cache(maxsize=16)
def _check(shape: Shape) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    cos, sin = table(1024, shape.head_dim)
    given = {
        "q": randn(1, 1024, shape.heads, shape.head_dim),
        "k": randn(1, 1024, shape.kv_heads, shape.head_dim),
        "cos": cos,
        "sin": sin,
    }
    assert_parity(partial(ops.rope, inplace=True), reference.rope, given, grad=("q", "k"))


def _providers(engines: frozenset[str]) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        return {"ours": partial(ops.rope, inplace=True), "torch": reference.rope}
    if "liger" in engines:
        from liger_kernel.ops.rope import LigerRopeFunction

        def liger(q, k, cos, sin):
            return LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

        return {"liger": liger}
    import unsloth  # noqa: F401 - must come before its kernels
    from unsloth.kernels import fast_rope_embedding

    return {"unsloth": lambda q, k, cos, sin: fast_rope_embedding(q.transpose(1, 2), k.transpose(1, 2), cos, sin)}


def tables_for(engines: frozenset[str], tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same angles in the form each engine takes: every angle once, or repeated for both halves."""
    cos, sin = table(tokens, width)
    if "ours" in engines:
        return cos, sin
    cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
    return (cos[None], sin[None]) if "liger" in engines else (cos, sin)


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points of these engines."""
    providers = _providers(engines)
    for shape, tokens in grid():
        q = randn(1, tokens, shape.heads, shape.head_dim)
        k = randn(1, tokens, shape.kv_heads, shape.head_dim)
        tables = tables_for(engines, tokens, shape.head_dim)
        size = 2 * (q.nbytes + k.nbytes) + 2 * tokens * shape.head_dim
        here = chosen(providers, engines, shape, tokens)
        yield from both_directions(
            "rope", shape, tokens, here, (q, k, *tables),
            forward_bytes=size, backward_bytes=size, check=partial(_check, shape),
        )  # fmt: skip
