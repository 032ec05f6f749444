"""Log-probabilities from hidden states with a frozen head, loss and gradient; and the forward alone, as for old and
reference passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from _cases import randn
from cross_entropy import targets
from runner import SHAPES, Case

TOKENS = (4096, 16384)


@lru_cache(maxsize=8)
def _check(hidden: int, vocabulary: int) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"hidden": randn(1500, hidden), "weight": randn(vocabulary, hidden, grad=False) * 0.02}
    given |= {"target": targets(1500, vocabulary), "return_entropy": True}
    assert_parity(ops.linear_logprobs, reference.linear_logprobs, given, grad=("hidden",))


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """Ours and plain PyTorch; the peers' own forms are measured whole in grpo_loss.py."""
    if "ours" not in engines:
        return
    from dropforge_kernels import ops

    def plain(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax((h @ w.t()).float(), -1).gather(1, t[:, None])

    def ours(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ops.linear_logprobs(h, w, t).logprobs

    shape = SHAPES[0]
    for tokens in TOKENS:
        hidden, weight = randn(tokens, shape.hidden), randn(shape.vocab, shape.hidden, grad=False) * 0.02
        target, values = targets(tokens, shape.vocab), hidden.detach()
        common = {"op": "linear_logprobs", "shape": shape.name, "tokens": tokens, "dtype": torch.bfloat16}
        common |= {"memory": True, "check": partial(_check, shape.hidden, shape.vocab)}
        product = 2 * tokens * shape.hidden * shape.vocab
        for name, call in {"ours": ours, "torch": plain}.items():
            forward = {name: partial(_without_gradient, call, values, weight, target)}
            yield Case(direction="forward", providers=forward, flops=product, **common)
            both = {name: partial(_both, call, hidden, weight, target)}
            yield Case(direction="forward+backward", providers=both, flops=2 * product, **common)


def _without_gradient(call: Callable, *tensors: torch.Tensor) -> object:
    with torch.no_grad():
        return call(*tensors)


def _both(call: Callable, hidden: torch.Tensor, *rest: torch.Tensor) -> object:
    return torch.autograd.grad(call(hidden, *rest).square().sum(), hidden)
