"""Squared ReLU at the models' MLP widths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

from _cases import both_directions, chosen, grid, randn
from runner import Case


@lru_cache(maxsize=16)
def _check(width: int) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    assert_parity(ops.relu_squared, reference.relu_squared, {"x": randn(1024, width)}, grad=("x",))


def _providers(engines: frozenset[str]) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        return {"ours": ops.relu_squared, "torch": reference.relu_squared}
    if "liger" in engines:
        from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

        return {"liger": LigerReLUSquaredFunction.apply}
    return {}  # Unsloth has none


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points of these engines."""
    providers = _providers(engines)
    for shape, tokens in grid():
        x = randn(1, tokens, shape.intermediate)
        here = chosen(providers, engines, shape, tokens)
        yield from both_directions(
            "relu_squared", shape, tokens, here, (x,),
            forward_bytes=2 * x.nbytes, backward_bytes=3 * x.nbytes, check=partial(_check, shape.intermediate),
        )  # fmt: skip
