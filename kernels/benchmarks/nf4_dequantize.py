"""NF4 double-quantised weights to bf16: the seven matrices of one Llama-8B layer into caller's buffers, and its
largest alone.

"one launch" is ops.nf4_dequantize_group over the layer; peers have no such form, so their seven calls stand beside
it. ``tokens`` holds the number of matrices. Weights are quantised by bitsandbytes in every process; "bitsandbytes" is
measured in ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from runner import SHAPES, Case

LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))


def _quantized(shape: tuple[int, int]) -> tuple:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return packed, state, torch.empty_like(weight)


def _ours(packed: torch.Tensor, state: object, out: torch.Tensor) -> torch.Tensor:
    from dropforge_kernels import ops

    return ops.nf4_dequantize(
        packed,
        state.absmax,
        state.code,
        shape=out.shape,
        dtype=out.dtype,
        nested_absmax=state.state2.absmax,
        nested_code=state.state2.code,
        nested_offset=state.offset,
        nested_blocksize=state.state2.blocksize,
        out=out,
    )


def _providers(engines: frozenset[str]) -> dict[str, Callable]:
    if "ours" in engines:
        from bitsandbytes.functional import dequantize_4bit

        return {"ours": _ours, "bitsandbytes": lambda packed, state, out: dequantize_4bit(packed, state, out=out)}
    if "unsloth" in engines:
        import unsloth  # noqa: F401 - must come before its kernels
        from unsloth.kernels.utils import fast_dequantize

        return {"unsloth": lambda packed, state, out: fast_dequantize(packed, state, out=out)}
    return {}


def _group_call(weights: list[tuple]) -> Callable[[], object]:
    from dropforge_kernels import ops

    fields = [
        ops.Nf4Weight(packed, s.absmax, s.state2.absmax, s.offset, tuple(out.shape)) for packed, s, out in weights
    ]
    first = weights[0][1]
    group = ops.nf4_group(fields, code=first.code, nested_code=first.state2.code)
    buffer = torch.empty(group.numel, device="cuda", dtype=torch.bfloat16)
    return lambda: ops.nf4_dequantize_group(group, buffer)


def _check_group(weights: list[tuple], call: Callable[[], object]) -> None:
    from bitsandbytes.functional import dequantize_4bit

    for view, (packed, state, _) in zip(call(), weights, strict=True):
        if not torch.equal(view.view(torch.int16), dequantize_4bit(packed, state).view(torch.int16)):
            raise AssertionError(f"differs from bitsandbytes at {tuple(view.shape)}")


def _check(weights: list[tuple]) -> None:
    from bitsandbytes.functional import dequantize_4bit

    for packed, state, out in weights:
        _ours(packed, state, out.fill_(float("nan")))
        if not torch.equal(out.view(torch.int16), dequantize_4bit(packed, state).view(torch.int16)):
            raise AssertionError(f"differs from bitsandbytes at {tuple(out.shape)}")


def cases(engines: frozenset[str]) -> Iterator[Case]:
    """A layer, and one matrix."""
    for shapes in (LAYER, LAYER[4:5]):
        weights = [_quantized(shape) for shape in shapes]
        size = sum(out.numel() for *_, out in weights)
        moved = size // 2 + size // 64 + size // 64 // 256 * 4 + 2 * size
        providers = {
            name: lambda call=call, weights=weights: [call(*w) for w in weights]
            for name, call in _providers(engines).items()
        }
        yield Case(
            op="nf4_dequantize",
            direction="forward",
            shape=SHAPES[0].name,
            tokens=len(shapes),
            dtype=torch.bfloat16,
            providers=providers,
            bytes=moved,
            check=(lambda weights=weights: _check(weights)) if "ours" in engines else None,
        )
        if shapes is LAYER:
            check = None
            if "ours" in engines:
                providers = providers | {"ours": _group_call(weights)}
                check = partial(_check_group, weights, providers["ours"])
            common = {"op": "nf4_dequantize", "shape": SHAPES[0].name, "tokens": 7, "dtype": torch.bfloat16}
            yield Case(direction="one launch", providers=providers, bytes=moved, check=check, **common)
