"""GRPO from hidden states: log-probabilities, clipped loss with KL to a reference, gradient to the hidden states.
1,024-token completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from _cases import randn
from cross_entropy import targets
from runner import SHAPES, Case

LENGTH = 1024
BETA, EPSILON = 0.04, 0.2


@lru_cache(maxsize=1)
def _check() -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"logprobs": -randn(16, LENGTH, grad=False, dtype=torch.float32).abs()}
    given |= {"old_logprobs": given["logprobs"] + 0.3, "ref_logprobs": given["logprobs"] - 0.2, "beta": BETA}
    given |= {"advantages": randn(16, grad=False, dtype=torch.float32), "mask": given["logprobs"] < -0.1}
    assert_parity(ops.grpo_loss, reference.grpo_loss, given, grad=("logprobs",))


def _providers(engines: frozenset[str]) -> dict[str, Callable]:
    if "ours" in engines:
        from dropforge_kernels import ops, reference

        return {kind: _step(module) for kind, module in (("ours", ops), ("torch", reference))}
    if "liger" in engines:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=BETA, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="bnpo")
        return {
            "liger": lambda h, w, t, mask, a, old, ref: loss(
                h, w, t, mask, a, ref_per_token_logps=ref, old_per_token_logps=old
            )[0]
        }
    return {}


def _step(kind: object) -> Callable:
    def run(h, w, t, mask, advantages, old, ref):
        logprobs = kind.linear_logprobs(h, w, t).logprobs
        options = {"loss_type": "bnpo", "epsilon": EPSILON, "beta": BETA}
        return kind.grpo_loss(logprobs, advantages, mask, old_logprobs=old, ref_logprobs=ref, **options).loss

    return run


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """4 and 16 completions of a Llama-8B."""
    shape = SHAPES[0]
    for batch in (4, 16):
        hidden = randn(batch, LENGTH, shape.hidden)
        weight = randn(shape.vocab, shape.hidden, grad=False) * 0.02
        target = targets(batch * LENGTH, shape.vocab).view(batch, LENGTH)
        mask = torch.ones(batch, LENGTH, device="cuda", dtype=torch.int32)
        advantages = randn(batch, grad=False, dtype=torch.float32)
        old, ref = (-randn(batch, LENGTH, grad=False, dtype=torch.float32).abs() - 11 for _ in range(2))
        rest = (weight, target, mask, advantages, old, ref)
        common = {"op": "grpo_loss", "shape": shape.name, "tokens": batch * LENGTH, "dtype": torch.bfloat16}
        common |= {"memory": True, "check": _check if "ours" in engines else None}
        for name, call in _providers(engines).items():
            both = {name: lambda call=call, h=hidden, rest=rest: torch.autograd.grad(call(h, *rest), h)}
            flops = 4 * hidden.numel() * shape.vocab
            yield Case(direction="loss+gradient", providers=both, flops=flops, **common)
