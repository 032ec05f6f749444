"""RMSNorm and residual addition + RMSNorm; backward with a frozen weight (LoRA) and with a trained one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
from _cases import both_directions, chosen, grid, randn
from runner import Case, Shape

EPS = 1e-6


@lru_cache(maxsize=16)
def _check(width: int) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"x": randn(1024, width), "weight": randn(width), "eps": EPS}
    assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("x", "weight"))
    given["residual"] = randn(1024, width)
    assert_parity(ops.add_rms_norm, reference.add_rms_norm, given, grad=("x", "residual", "weight"))


def _plain(engines: frozenset[str]) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        return {"ours": partial(ops.rms_norm, eps=EPS), "torch": partial(reference.rms_norm, eps=EPS)}
    if "liger" in engines:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return {"liger": lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", True)}
    import unsloth  # noqa: F401 - must come before its kernels
    from unsloth.kernels import fast_rms_layernorm

    return {"unsloth": lambda x, weight: fast_rms_layernorm(norm_module(weight), x)}


@lru_cache(maxsize=4)
def norm_module(weight: torch.Tensor) -> SimpleNamespace:
    """What Unsloth's functions read of a norm module."""
    return SimpleNamespace(weight=weight, variance_epsilon=EPS)


def _residual(engines: frozenset[str]) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        return {"ours": partial(ops.add_rms_norm, eps=EPS), "torch": partial(reference.add_rms_norm, eps=EPS)}
    if "liger" in engines:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return {"liger": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)}
    plain = _plain(engines)["unsloth"]  # it has no fused training form: addition, then norm

    def add_norm(x, residual, weight):
        total = x + residual
        return plain(total, weight), total

    return {"unsloth": add_norm}


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points of these engines."""
    plain, residual = _plain(engines), _residual(engines)
    for shape, tokens in grid():
        yield from _at(shape, tokens, plain, residual, engines)


def _at(shape: Shape, tokens: int, plain: dict, residual: dict, engines: frozenset[str]) -> Iterator[Case]:
    size = 2 * tokens * shape.hidden  # bytes of one bf16 activation
    check = partial(_check, shape.hidden)
    x, r = randn(1, tokens, shape.hidden), randn(1, tokens, shape.hidden)
    frozen, trained = randn(shape.hidden, grad=False), randn(shape.hidden)
    here = chosen(plain, engines, shape, tokens)
    sizes = {"forward_bytes": 2 * size, "backward_bytes": 3 * size, "check": check}
    yield from both_directions("rms_norm", shape, tokens, here, (x, frozen), **sizes)
    yield from both_directions(
        "rms_norm", shape, tokens, here, (x, trained), **sizes, forward=False, backward_name="backward+dweight"
    )
    here = chosen(residual, engines, shape, tokens)
    sizes = {"forward_bytes": 4 * size, "backward_bytes": 4 * size, "check": check}
    yield from both_directions("add_rms_norm", shape, tokens, here, (x, r, frozen), **sizes)
