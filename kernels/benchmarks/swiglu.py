"""SwiGLU of separate gate and up projections. Unsloth's backward is called as its fused MLP calls it: in place."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from _cases import both_directions, chosen, grid, randn
from runner import Case


@lru_cache(maxsize=16)
def _check(width: int) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"gate": randn(1024, width), "up": randn(1024, width)}
    assert_parity(ops.swiglu, reference.swiglu, given, grad=("gate", "up"))
    packed = {"gate_up": randn(1024, 2 * width)}
    assert_parity(ops.swiglu_clamped, reference.swiglu_clamped, packed, grad=("gate_up",))


def _providers(engines: frozenset[str]) -> dict:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        return {"ours": ops.swiglu, "torch": reference.swiglu}
    if "liger" in engines:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return {"liger": LigerSiLUMulFunction.apply}
    import unsloth  # noqa: F401 - must come before its kernels
    from unsloth.kernels import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel

    return {"unsloth": peer_activation(swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel)}


def peer_activation(forward, backward):
    """An autograd function around a peer's two launches; the backward one takes (rows, I) and writes in place."""

    class Activation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return forward(gate, up)

        @staticmethod
        def backward(ctx, dh):
            gate, up = ctx.saved_tensors
            rows = (t.view(-1, t.shape[-1]) for t in (dh, gate, up))
            _, dup, dgate = backward(*rows)
            return dgate.view(gate.shape), dup.view(up.shape)

    return Activation.apply


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points of these engines, and gpt-oss's clamped form (ours and torch only)."""
    providers = _providers(engines)
    for shape, tokens in grid():
        tensors = randn(1, tokens, shape.intermediate), randn(1, tokens, shape.intermediate)
        size, check = tensors[0].nbytes, partial(_check, shape.intermediate)
        here = chosen(providers, engines, shape, tokens)
        sizes = {"forward_bytes": 3 * size, "backward_bytes": 5 * size, "check": check}
        yield from both_directions("swiglu", shape, tokens, here, tensors, **sizes)
        if "ours" in engines and tokens == 16384:
            from dropforge_kernels import ops, reference

            clamped = {"ours": ops.swiglu_clamped, "torch": reference.swiglu_clamped}
            packed = (randn(1, tokens, 2 * shape.intermediate),)
            yield from both_directions("swiglu_clamped", shape, tokens, clamped, packed, **sizes)
