"""Cross-entropy of bf16 logits: the default path (forward, backward) and loss + gradient with the gradient in place
of the logits, which is what Liger and Unsloth do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from _cases import COMPILED_AT, randn
from runner import SHAPES, Case

TOKENS = {"llama-8b": (1024, 4096, 16384)}  # the other models at the two larger sizes


def targets(tokens: int, vocabulary: int) -> torch.Tensor:
    """Random targets, none ignored."""
    return torch.randint(0, vocabulary, (tokens,), device="cuda")


@lru_cache(maxsize=8)
def _check(vocabulary: int) -> None:
    from dropforge_kernels import ops, reference
    from dropforge_kernels.testing import assert_parity

    given = {"logits": randn(256, vocabulary), "target": targets(256, vocabulary)}
    assert_parity(ops.cross_entropy, reference.cross_entropy, given, grad=("logits",))


def _providers(engines: frozenset[str], vocabulary: int) -> dict[str, Callable]:
    if "ours" in engines:
        from dropforge_kernels import ops

        return {
            "ours": partial(ops.cross_entropy, inplace_gradient=True),
            "torch": lambda logits, target: torch.nn.functional.cross_entropy(logits.float(), target),
        }
    if "liger" in engines:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return {"liger": liger_cross_entropy}
    import unsloth  # noqa: F401 - must come before its kernels
    from unsloth.kernels.cross_entropy_loss import fast_cross_entropy_loss

    return {"unsloth": lambda logits, target: fast_cross_entropy_loss(logits[None], target[None])}


def loss_and_gradient(loss: Callable, leaf: torch.Tensor, *rest: torch.Tensor) -> Callable[[], object]:
    """A call that computes the loss and its gradient to ``leaf``."""
    return lambda: torch.autograd.grad(loss(leaf, *rest), leaf)


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """Llama, Qwen3 and Gemma-3 vocabularies."""
    for shape in SHAPES:
        for tokens in TOKENS.get(shape.name, (4096, 16384)):
            target = targets(tokens, shape.vocab)
            providers = _providers(engines, shape.vocab)
            if "compile" in engines and (shape.name, tokens) == COMPILED_AT:
                providers["compile"] = torch.compile(providers["torch"], dynamic=False)
            common = {"op": "cross_entropy", "shape": shape.name, "tokens": tokens, "dtype": torch.bfloat16}
            common["check"] = partial(_check, shape.vocab) if "ours" in engines else None
            for name, call in providers.items():
                logits = randn(tokens, shape.vocab)
                both = {name: loss_and_gradient(call, logits, target)}
                yield Case(direction="loss+gradient", providers=both, bytes=2 * logits.nbytes, **common)
            if "ours" in engines:
                yield from _default_path(logits, target, common)


def _default_path(logits: torch.Tensor, target: torch.Tensor, common: dict) -> Iterator[Case]:
    from dropforge_kernels import ops

    values = logits.detach()
    forward = {"ours": lambda: ops.cross_entropy(values, target)}
    yield Case(direction="forward", providers=forward, bytes=logits.nbytes, **common)
    loss = ops.cross_entropy(logits, target)
    backward = {"ours": lambda: torch.autograd.grad(loss, logits, retain_graph=True)}
    yield Case(direction="backward", providers=backward, bytes=2 * logits.nbytes, **common)
