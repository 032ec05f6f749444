"""Fused linear cross-entropy with a frozen head: loss and gradient to the hidden states. "gemm" is the floor: the two
matrix products alone, on 8,192 rows at a time. "loss+gradient, 45% ignored" counts the floating-point operations of
the counted rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from _cases import randn
from cross_entropy import loss_and_gradient, targets
from runner import SHAPES, Case, Shape

TOKENS = {"llama-8b": (1024, 4096, 16384)}  # the other models at the two larger sizes


@lru_cache(maxsize=8)
def _check(hidden: int, vocabulary: int) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"hidden": randn(1500, hidden), "weight": randn(vocabulary, hidden, grad=False) * 0.02}
    given |= {"target": targets(1500, vocabulary), "memory_budget": 1024 * vocabulary * 2}
    given["target"][::3] = -100
    assert_parity(ops.linear_cross_entropy, reference.linear_cross_entropy, given, grad=("hidden",))


def _providers(engines: frozenset[str]) -> dict[str, Callable]:
    if "ours" in engines:
        from dropforge_kernels import ops

        return {
            "ours": ops.linear_cross_entropy,
            "torch": lambda h, w, t: torch.nn.functional.cross_entropy((h @ w.t()).float(), t),
        }
    if "liger" in engines:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return {"liger": liger_fused_linear_cross_entropy}
    import unsloth  # noqa: F401 - must come before unsloth_zoo
    from unsloth_zoo.fused_losses import unsloth_fused_ce_loss

    return {"unsloth": lambda h, w, t: unsloth_fused_ce_loss(None, h[None], w, None, t[None], shift_labels=False)}


def _gemm(hidden: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    rows = min(8192, hidden.shape[0])
    part = hidden.detach()[:rows]
    # d logits must look like one (random data): a product on zeros or constants runs faster
    d_logits = torch.randn(rows, weight.shape[0], device="cuda", dtype=hidden.dtype)
    logits, out = torch.empty_like(d_logits), torch.empty_like(part)

    def run() -> None:
        for _ in range(hidden.shape[0] // rows):
            torch.mm(part, weight.t(), out=logits)
            torch.mm(d_logits, weight, out=out)

    return run


def _at(engines: frozenset[str], shape: Shape, tokens: int) -> Iterator[Case]:
    hidden = randn(tokens, shape.hidden)
    weight = randn(shape.vocab, shape.hidden, grad=False) * 0.02
    target = targets(tokens, shape.vocab)
    flops = 4 * tokens * shape.hidden * shape.vocab
    common = {"op": "linear_cross_entropy", "shape": shape.name, "tokens": tokens, "dtype": torch.bfloat16}
    common |= {"memory": True, "check": partial(_check, shape.hidden, shape.vocab) if "ours" in engines else None}
    if "ours" in engines:
        yield Case(direction="loss+gradient", providers={"gemm": _gemm(hidden, weight)}, flops=flops, **common)
    providers = _providers(engines)
    for name, call in providers.items():
        both = {name: loss_and_gradient(call, hidden, weight, target)}
        yield Case(direction="loss+gradient", providers=both, flops=flops, **common)
    if shape is not SHAPES[0]:
        return
    masked = target.clone()
    masked[torch.rand(tokens, device="cuda") < 0.45] = -100
    counted = flops * int((masked != -100).sum()) // tokens
    for name, call in providers.items():
        both = {name: loss_and_gradient(call, hidden, weight, masked)}
        yield Case(direction="loss+gradient, 45% ignored", providers=both, flops=counted, **common)


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """Heads of Llama-8B, Qwen3-0.6B and Gemma-3-4B."""
    for shape in SHAPES:
        for tokens in TOKENS.get(shape.name, (4096, 16384)):
            yield from _at(engines, shape, tokens)
