"""GeGLU with the tanh approximation (Gemma) and exact."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

from _cases import both_directions, chosen, grid, randn
from runner import Case
from swiglu import peer_activation


@lru_cache(maxsize=16)
def _check(width: int, approximate: str) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"gate": randn(1024, width), "up": randn(1024, width), "approximate": approximate}
    assert_parity(ops.geglu, reference.geglu, given, grad=("gate", "up"))


def _providers(engines: frozenset[str], approximate: str) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        kind = {"approximate": approximate}
        return {"ours": partial(ops.geglu, **kind), "torch": partial(reference.geglu, **kind)}
    if "liger" in engines:
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return {"liger": LigerGELUMulFunction.apply} if approximate == "tanh" else {}
    import unsloth  # noqa: F401 - must come before its kernels
    from unsloth.kernels import geglu

    if approximate == "tanh":
        pair = geglu.geglu_approx_forward_kernel, geglu.geglu_approx_backward_kernel
    else:
        pair = geglu.geglu_exact_forward_kernel, geglu.geglu_exact_backward_kernel
    return {"unsloth": peer_activation(*pair)}


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points of these engines."""
    for approximate, name in (("tanh", "geglu_tanh"), ("none", "geglu_exact")):
        providers = _providers(engines, approximate)
        for shape, tokens in grid():
            tensors = randn(1, tokens, shape.intermediate), randn(1, tokens, shape.intermediate)
            size = tensors[0].nbytes
            here = chosen(providers, engines, shape, tokens)
            yield from both_directions(
                name, shape, tokens, here, tensors,
                forward_bytes=3 * size, backward_bytes=5 * size, check=partial(_check, shape.intermediate, approximate),
            )  # fmt: skip
