"""Norms in a steady state: 16 calls over 16 sets of tensors in one CUDA graph, as inside a captured training step.

The other files time one call after the caches were flushed by writing. At 20 to 40 microseconds that counts the start
of the launch and the flushed values' way back to memory, which the call itself has nothing to do with. Here every call
finds what the one before left, and "copies" are as many copies that move the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from _cases import randn
from runner import SHAPES, Case, Shape

TOKENS, SETS, EPS = 16384, 16, 1e-6


def _graph(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One replay runs them all; each runs once before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def _calls(width: int) -> Iterator[tuple[str, str, int, Callable[[int], object]]]:
    """(operation, direction, tensors of one activation's size that move, call of one set)."""
    from dropforge_kernels.ops.layer_norm import _backward, _forward
    from dropforge_kernels.ops.rms_norm import rms_norm_backward, rms_norm_forward

    x, dy = ([randn(TOKENS, width, grad=False) for _ in range(SETS)] for _ in range(2))
    weight, bias = randn(width, grad=False), randn(width, grad=False)
    rstd = [rms_norm_forward(t, weight, EPS, 0.0, True)[2] for t in x]
    mean, deviation = zip(*(_forward(t, weight, bias, EPS)[1:] for t in x), strict=True)
    yield "rms_norm", "forward", 2, lambda i: rms_norm_forward(x[i], weight, EPS, 0.0, True)
    yield "rms_norm", "backward", 3, lambda i: rms_norm_backward(dy[i], x[i], weight, rstd[i], 0.0, False)
    yield "rms_norm", "backward+dweight", 3, lambda i: rms_norm_backward(dy[i], x[i], weight, rstd[i], 0.0, True)
    yield "layer_norm", "forward", 2, lambda i: _forward(x[i], weight, bias, EPS)
    yield "layer_norm", "backward", 3, lambda i: _backward(dy[i], x[i], weight, mean[i], deviation[i], False, True)
    yield (
        *("layer_norm", "backward+parameters", 3),
        lambda i: _backward(dy[i], x[i], weight, mean[i], deviation[i], True, True),
    )


def _copies(width: int, tensors: int) -> Callable[[int], object]:
    sources = [randn(TOKENS * tensors // 2, width, grad=False) for _ in range(SETS)]
    targets = [torch.empty_like(t) for t in sources]
    return lambda i: targets[i].copy_(sources[i])


def _case(shape: Shape, op: str, direction: str, tensors: int, call: Callable[[int], object]) -> Case:
    each = {"ours": call, "copies": _copies(shape.hidden, tensors)}
    providers = {name: _graph([lambda i=i, f=f: f(i) for i in range(SETS)]) for name, f in each.items()}
    size = 2 * TOKENS * shape.hidden
    return Case(
        op=f"steady {op}", direction=direction, shape=shape.name, tokens=TOKENS, dtype=torch.bfloat16,
        providers=providers, bytes=SETS * tensors * size,
    )  # fmt: skip


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """All points; only the base process takes part."""
    if "ours" not in engines:
        return
    for shape in SHAPES:
        for op, direction, tensors, call in _calls(shape.hidden):
            yield _case(shape, op, direction, tensors, call)
