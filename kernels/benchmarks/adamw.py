"""AdamW over a flat fp32 buffer (``tokens`` holds its values in millions): r=16 adapters of Llama-8B, and 100 million
values.

Peers: torch's fused AdamW on the same flat buffer (the best case for it) and bitsandbytes' 8-bit AdamW, in our process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from runner import Case

SIZES = (41_943_040, 104_857_600)
BYTES = {32: 28, 8: 16}
"""Moved per value: parameter read and written, gradient read, two states read and written."""


def _check(bits: int) -> None:
    from dropforge_kernels import ops, reference

    ours, theirs = (torch.linspace(-1, 1, 100_001, device="cuda") for _ in range(2))
    state, other = ops.adamw_state(ours, bits=bits), ops.adamw_state(theirs, bits=bits)
    for step in range(3):
        grad = torch.randn(100_001, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        ops.adamw(ours, grad, state, lr=1e-2, weight_decay=0.1)
        reference.adamw(theirs, grad, other, lr=1e-2, weight_decay=0.1)
    if not (ours - theirs).norm() <= (1e-6 if bits == 32 else 1e-4) * theirs.norm():
        raise AssertionError(f"relative error {float((ours - theirs).norm() / theirs.norm()):.1e}")


def _steps(bits: int, size: int) -> dict[str, Callable[[], object]]:
    from bitsandbytes.optim import AdamW8bit
    from dropforge_kernels import ops

    grad = torch.randn(size, device="cuda")
    param = torch.randn(size, device="cuda")
    state = ops.adamw_state(param, bits=bits)
    leaf = torch.randn(size, device="cuda", requires_grad=True)
    leaf.grad = grad
    name = "torch" if bits == 32 else "bitsandbytes"
    peer = torch.optim.AdamW([leaf], fused=True) if bits == 32 else AdamW8bit([leaf])
    return {"ours": lambda: ops.adamw(param, grad, state, lr=1e-4, weight_decay=0.01), name: peer.step}


def _clipped_steps(size: int) -> dict[str, Callable[[], object]]:
    from dropforge_kernels import ops

    grad = torch.randn(size, device="cuda")
    param = torch.randn(size, device="cuda")
    state = ops.adamw_state(param)
    leaf = torch.randn(size, device="cuda", requires_grad=True)
    leaf.grad = grad.clone()
    peer = torch.optim.AdamW([leaf], fused=True)

    def ours() -> None:
        ops.adamw(param, grad, state, lr=1e-4, grad_norm=ops.gradient_norm(grad), max_norm=1.0)

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_([leaf], 1.0)
        peer.step()

    return {"ours": ours, "torch": theirs}


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """32-bit and 8-bit states, and norm + clip + step."""
    if "ours" not in engines:
        return
    for size in SIZES:
        common = {"op": "adamw", "shape": "flat", "tokens": size // 1_000_000, "dtype": torch.float32}
        for bits in (32, 8):
            yield Case(
                direction=f"{bits}-bit step",
                providers=_steps(bits, size),
                bytes=BYTES[bits] * size,
                check=lambda bits=bits: _check(bits),
                **common,
            )
        yield Case(direction="norm+clip+step", providers=_clipped_steps(size), bytes=32 * size, **common)
