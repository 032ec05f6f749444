"""FP8 quantisation and back by rows (activations) and 128 x 128 blocks (weights), bf16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _cases import randn
from runner import SHAPES, Case

TOKENS = (1024, 16384)


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """Ours and plain PyTorch at Llama-8B's hidden size and MLP width."""
    if "ours" not in engines:
        return
    from dropforge_kernels import ops, reference

    for width in (SHAPES[0].hidden, SHAPES[0].intermediate):
        for tokens in TOKENS:
            x = randn(tokens, width, grad=False)
            for kind in ("rows", "blocks"):
                there, back = f"fp8_quantize_{kind}", f"fp8_dequantize_{kind}"
                codes, scale = getattr(ops, there)(x)

                def check(x=x, codes=codes, scale=scale, there=there, back=back) -> None:
                    expected, factors = getattr(reference, there)(x)
                    values = getattr(ops, back)(codes, scale, dtype=torch.bfloat16)
                    truth = getattr(reference, back)(expected, factors, dtype=torch.bfloat16)
                    if not (torch.equal(scale, factors) and torch.equal(values, truth)):
                        raise AssertionError("differs from the reference")

                common = {"op": "fp8", "shape": f"width-{width}", "tokens": tokens, "dtype": x.dtype, "check": check}
                kinds = (("ours", ops), ("torch", reference))
                quantize = {name: lambda m=m, x=x, f=there: getattr(m, f)(x) for name, m in kinds}
                yield Case(direction=f"quantize {kind}", providers=quantize, bytes=3 * x.numel(), **common)
                dequantize = {
                    name: lambda m=m, c=codes, s=scale, f=back: getattr(m, f)(c, s, dtype=torch.bfloat16)
                    for name, m in kinds
                }
                yield Case(direction=f"dequantize {kind}", providers=dequantize, bytes=3 * x.numel(), **common)
