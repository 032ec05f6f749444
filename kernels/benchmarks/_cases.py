"""How the benchmark files of one operation become cases: forward and backward of every provider at every shape.

A provider is a function of the operation's tensors. "torch" is the reference (what eager models compute), "compile"
the same under torch.compile; it is measured at one point (Llama-8B, 16,384 tokens), because compiling takes longer
than measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

import torch
from runner import SHAPES, TOKENS, Case, Shape

Provider = Callable[..., object]
COMPILED_AT = (SHAPES[0].name, 16384)


def randn(*shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random values on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=grad)


def grid() -> Iterator[tuple[Shape, int]]:
    """Every model with every number of tokens."""
    for shape in SHAPES:
        for tokens in TOKENS:
            yield shape, tokens


def chosen(
    providers: Mapping[str, Provider], engines: frozenset[str], shape: Shape, tokens: int
) -> dict[str, Provider]:
    """The providers of these engines at this point, with "compile" made from "torch"."""
    found = {name: call for name, call in providers.items() if name in engines}
    if "compile" in engines and (shape.name, tokens) == COMPILED_AT:
        torch._dynamo.reset()
        plain = providers["torch"]
        found["compile"] = torch.compile(lambda *tensors: plain(*tensors), dynamic=False)
    return found


def both_directions(
    op: str,
    shape: Shape,
    tokens: int,
    providers: Mapping[str, Provider],
    tensors: Sequence[torch.Tensor],
    *,
    forward_bytes: int | None = None,
    backward_bytes: int | None = None,
    forward_flops: int | None = None,
    backward_flops: int | None = None,
    check: Callable[[], object] | None = None,
    backward_name: str = "backward",
    forward: bool = True,
) -> Iterator[Case]:
    """A forward and a backward case. Backward is autograd's, of every tensor that requires a gradient, graph kept."""
    common = {"op": op, "shape": shape.name, "tokens": tokens, "dtype": tensors[0].dtype, "check": check}
    if forward:
        calls = {name: partial(call, *tensors) for name, call in providers.items()}
        yield Case(direction="forward", providers=calls, bytes=forward_bytes, flops=forward_flops, **common)
    leaves = [t for t in tensors if t.requires_grad]
    for name, call in providers.items():  # one at a time: a saved graph is as large as the activations
        calls = {name: _backward(call, tensors, leaves)}
        yield Case(direction=backward_name, providers=calls, bytes=backward_bytes, flops=backward_flops, **common)


def _backward(call: Provider, tensors: Sequence[torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """The backward of one provider; its forward runs at the first call."""

    @lru_cache(maxsize=1)
    def graph() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        out = call(*tensors)
        outputs = [o for o in (out if isinstance(out, tuple | list) else (out,)) if o.requires_grad]
        return outputs, [torch.randn_like(o) for o in outputs]

    def run() -> object:
        outputs, gradients = graph()
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return run
