"""QK-norm + RoPE with frozen norm weights. Liger has no fused form: two norms and its RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

from _cases import both_directions, chosen, grid, randn
from rms_norm import norm_module
from rope import table, tables_for
from runner import Case, Shape

EPS = 1e-6


@lru_cache(maxsize=16)
def _check(shape: Shape) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    cos, sin = table(1024, shape.head_dim)
    given = {
        "q": randn(1, 1024, shape.heads, shape.head_dim),
        "k": randn(1, 1024, shape.kv_heads, shape.head_dim),
        "q_weight": randn(shape.head_dim),
        "k_weight": randn(shape.head_dim),
        "cos": cos,
        "sin": sin,
        "eps": EPS,
    }
    assert_parity(ops.qk_norm_rope, reference.qk_norm_rope, given, grad=("q", "k", "q_weight", "k_weight"))


def _providers(engines: frozenset[str]) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        return {"ours": partial(ops.qk_norm_rope, eps=EPS), "torch": partial(reference.qk_norm_rope, eps=EPS)}
    if "liger" in engines:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction

        def liger(q, k, q_weight, k_weight, cos, sin):
            q = LigerRMSNormFunction.apply(q, q_weight, EPS, 0.0, "llama", True)
            k = LigerRMSNormFunction.apply(k, k_weight, EPS, 0.0, "llama", True)
            return LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

        return {"liger": liger}
    import unsloth  # noqa: F401 - must come before its kernels
    from unsloth.kernels.qk_norm_rope import fast_qk_norm_rope

    def unsloth_norm_rope(q, k, q_weight, k_weight, cos, sin):
        return fast_qk_norm_rope(norm_module(q_weight), norm_module(k_weight), q, k, cos, sin)

    return {"unsloth": unsloth_norm_rope}


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points of these engines."""
    providers = _providers(engines)
    for shape, tokens in grid():
        q = randn(1, tokens, shape.heads, shape.head_dim)
        k = randn(1, tokens, shape.kv_heads, shape.head_dim)
        weights = randn(shape.head_dim, grad=False), randn(shape.head_dim, grad=False)
        tables = tables_for(engines, tokens, shape.head_dim)
        size = q.nbytes + k.nbytes
        here = chosen(providers, engines, shape, tokens)
        yield from both_directions(
            "qk_norm_rope", shape, tokens, here, (q, k, *weights, *tables),
            forward_bytes=2 * size + 2 * tokens * shape.head_dim,
            backward_bytes=3 * size + 2 * tokens * shape.head_dim, check=partial(_check, shape),
        )  # fmt: skip
