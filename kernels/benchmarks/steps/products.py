"""The matrix products of LoRA projections alone, in microseconds: how the low-rank term joins the frozen product.

base            x W^T
low rank term   low B^T, low = x A^T
onto it         base added onto the low-rank term inside the product (what the engine does)
onto a copy     the same, the result in other memory
concatenated    (x, low) (W, B)^T: one product with R more inputs, rounded up to 64 columns
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from steps.side_files import write_rows

TOKENS, TINY_TOKENS = (8192, 16384), (32,)
PROJECTIONS = {
    "qkv": (6144, 4096, 96), "gate_up": (28672, 4096, 64), "down": (4096, 14336, 32), "o": (4096, 4096, 32),
    "qkv0.6b": (4096, 1024, 48), "gu0.6b": (6144, 1024, 32), "down0.6b": (1024, 3072, 16),
}  # fmt: skip
"""Outputs, inputs and summed ranks: Llama-8B at rank 32, Qwen3-0.6B at rank 16."""
TINY = {"qkv": (96, 64, 12)}
COLUMNS = (
    "projection", "tokens", "tflops_of_base", "base_us", "low_rank_term_us", "base_onto_it_us", "base_onto_a_copy_us",
    "concatenated_us", "x_a_us", "dy_b_us", "dx_us", "db_us", "da_us", "dlow_a_us", "gpu", "torch", "commit",
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Writes the CSV at ``args.out``. On a CPU: one tiny projection, which tries the script itself."""
    cuda = args.device == "cuda"
    rows = (
        _row(name, tokens, *sizes, device=args.device)
        for tokens in (TOKENS if cuda else TINY_TOKENS)
        for name, sizes in (PROJECTIONS if cuda else TINY).items()
    )
    write_rows(args.out, COLUMNS, rows, device=args.device, commit=args.commit)


def _row(name: str, tokens: int, outputs: int, inputs: int, rank: int, *, device: str) -> dict[str, object]:
    times = {f"{word}_us": _time(call, device) for word, call in _calls(tokens, outputs, inputs, rank, device)}
    rate = 2e-6 * tokens * outputs * inputs / times["base_us"]
    return {"projection": name, "tokens": tokens, "tflops_of_base": rate} | times


def _calls(tokens: int, n: int, k: int, r: int, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.05

    x, w, a, b, low, dy = (
        random(tokens, k),
        random(n, k),
        random(r, k),
        random(n, r),
        random(tokens, r),
        random(tokens, n),
    )
    y, wide = torch.empty_like(dy), -(-r // 64) * 64
    joined_x, joined_w = random(tokens, k + wide), random(n, k + wide)
    fp32 = {"out_dtype": torch.float32} if device == "cuda" else {}
    yield "base", lambda: torch.mm(x, w.t(), out=y)
    yield "low_rank_term", lambda: torch.mm(low, b.t(), out=y)
    yield "base_onto_it", lambda: y.addmm_(x, w.t())
    yield "base_onto_a_copy", lambda: torch.addmm(y, x, w.t())
    yield "concatenated", lambda: torch.mm(joined_x, joined_w.t(), out=y)
    yield "x_a", lambda: x @ a.t()
    yield "dy_b", lambda: dy @ b
    yield "dx", lambda: dy @ w
    yield "db", lambda: torch.mm(dy.t(), low, **fp32)
    yield "da", lambda: torch.mm(low.t(), x, **fp32)
    yield "dlow_a", lambda: low @ a


def _time(call: Callable[[], object], device: str) -> float:
    """Median microseconds; on a GPU with a cold cache, as triton's do_bench measures."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e3 * float(do_bench(call, warmup=20, rep=60, return_mode="median"))
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return 1e6 * median(spent)
