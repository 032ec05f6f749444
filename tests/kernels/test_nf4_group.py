"""A group of NF4 weights in one launch: the bits of nf4_dequantize, into one buffer."""

from __future__ import annotations

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES


def weight(shape, seed, device):
    generator = torch.Generator().manual_seed(seed)
    blocks = shape[0] * shape[1] // 64
    fields = (
        torch.randint(0, 256, (shape[0] * shape[1] // 2, 1), generator=generator).to(torch.uint8),
        torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8),
        torch.rand(-(-blocks // 256), generator=generator),
        torch.rand((), generator=generator),
    )
    return ops.Nf4Weight(*(f.to(device) for f in fields), shape)


def group(device, shapes=None):
    if shapes is None:
        shapes = ((32, 64), (64, 96), (2, 1024))
        if device == "cuda":
            shapes = ((4096, 4096), (1024, 4096), (512, 1000 * 1024 // 8), (2, 1024))
    weights = [weight(shape, seed, device) for seed, shape in enumerate(shapes)]
    code = (torch.linspace(-1, 1, 16) ** 3).to(device)
    nested = (torch.linspace(-1, 1, 256) ** 5).to(device)
    return ops.nf4_group(weights, code=code, nested_code=nested)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_equal_one_by_one(device, dtype):
    found = group(device)
    out = torch.full((found.numel + 10,), 7.0, dtype=dtype, device=device)
    views = ops.nf4_dequantize_group(found, out)
    for view, w in zip(views, found.weights, strict=True):
        one = ops.nf4_dequantize(
            w.packed,
            w.absmax,
            found.code,
            shape=w.shape,
            dtype=dtype,
            nested_absmax=w.nested_absmax,
            nested_code=found.nested_code,
            nested_offset=w.nested_offset,
        )
        assert torch.equal(bits(view), bits(one))
    assert views[1].data_ptr() == out.data_ptr() + views[0].nbytes
    assert bool((out[found.numel :] == 7).all())


def test_bits_equal_the_reference(device):
    found = group(device)
    out, truth = (torch.empty(found.numel, dtype=torch.float32, device=device) for _ in range(2))
    views = ops.nf4_dequantize_group(found, out)
    parts = truth.split([v.numel() for v in views])
    expected = reference.nf4_dequantize_group(found, [p.view(v.shape) for p, v in zip(parts, views, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


def test_compiles_without_graph_break(device):
    found = group(device)
    out = torch.empty(found.numel, device=device)
    compiled = torch.compile(lambda o: ops.nf4_dequantize_group(found, o)[1] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(out), ops.nf4_dequantize_group(found, out.clone())[1] * 2)


@pytest.mark.gpu
def test_cuda_graph_capture():
    found = group("cuda")
    out = torch.empty(found.numel, dtype=torch.bfloat16, device="cuda")
    ops.nf4_dequantize_group(found, out)
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.nf4_dequantize_group(found, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one weight; received none"):
        group("cpu", ())
    with pytest.raises(ValueError, match=r"weight 0 must have a multiple of 2048 values; received shape \(3, 64\)"):
        group("cpu", ((3, 64),))
    found = group("cpu")
    bad = found.weights[0]._replace(absmax=torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="absmax of weight 0 must be 32 contiguous values of torch.uint8; received 5"):
        ops.nf4_group([bad], code=found.code, nested_code=found.nested_code)
    with pytest.raises(ValueError, match="out must be flat and contiguous with at least"):
        ops.nf4_dequantize_group(found, torch.empty(5))
    with pytest.raises(TypeError, match="out must have dtype"):
        ops.nf4_dequantize_group(found, torch.empty(found.numel, dtype=torch.float64))
