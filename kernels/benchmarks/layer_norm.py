"""LayerNorm with trained weight and bias, and with frozen ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from _cases import both_directions, chosen, grid, randn
from runner import Case

EPS = 1e-5


@lru_cache(maxsize=16)
def _check(width: int) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"x": randn(1024, width), "weight": randn(width), "bias": randn(width), "eps": EPS}
    assert_parity(ops.layer_norm, reference.layer_norm, given, grad=("x", "weight", "bias"))


def _providers(engines: frozenset[str]) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops

        return {
            "ours": partial(ops.layer_norm, eps=EPS),
            "torch": lambda x, w, b: torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, EPS),
        }
    if "liger" in engines:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return {"liger": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)}
    return {}  # Unsloth's training path uses torch's own


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points of these engines."""
    providers = _providers(engines)
    for shape, tokens in grid():
        size = 2 * tokens * shape.hidden
        x = randn(1, tokens, shape.hidden)
        here = chosen(providers, engines, shape, tokens)
        sizes = {"forward_bytes": 2 * size, "backward_bytes": 3 * size, "check": partial(_check, shape.hidden)}
        frozen = (x, randn(shape.hidden, grad=False), randn(shape.hidden, grad=False))
        yield from both_directions("layer_norm", shape, tokens, here, frozen, **sizes)
        trained = (x, randn(shape.hidden), randn(shape.hidden))
        yield from both_directions(
            "layer_norm", shape, tokens, here, trained, **sizes, forward=False, backward_name="backward+parameters"
        )
