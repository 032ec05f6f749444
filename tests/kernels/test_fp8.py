"""FP8 quantisation and back: the reference's bits, its error bound, odd sizes, bad values."""

from __future__ import annotations

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, LAYOUTS, poisoned_memory, random_tensor

KINDS = {
    "rows": (
        ops.fp8_quantize_rows,
        ops.fp8_dequantize_rows,
        reference.fp8_quantize_rows,
        reference.fp8_dequantize_rows,
    ),
    "blocks": (
        ops.fp8_quantize_blocks,
        ops.fp8_dequantize_blocks,
        reference.fp8_quantize_blocks,
        reference.fp8_dequantize_blocks,
    ),
}


def sizes(device):
    if device == "cpu":
        return ((0, 5), (1, 1), (3, 130), (129, 40), (2, 5000))
    return ((0, 5), (1, 1), (7, 130), (129, 333), (300, 5000), (1024, 4096), (4096, 14336), (65, 28672))


def spread(shape, dtype, device, layout="contiguous"):
    """Values over many magnitudes, so that normal and subnormal codes occur, with a row of zeros."""
    x = random_tensor(shape, dtype=dtype, device=device, layout=layout)
    scale = random_tensor(shape, dtype=torch.float32, device=device, seed=3, scale=2.5).exp2().to(dtype)
    x.mul_(scale)
    if shape[0] > 2:
        x[1] = 0
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_equal_the_reference(device, dtype, kind):
    quantize, dequantize, ref_quantize, ref_dequantize = KINDS[kind]
    for shape in sizes(device):
        x = spread(shape, dtype, device)
        with poisoned_memory():
            codes, scale = quantize(x)
            back = dequantize(codes, scale, dtype=torch.float32)
        ref_codes, ref_scale = ref_quantize(x)
        assert torch.equal(codes.float(), ref_codes.float()), shape  # by value: the interpreter loses the sign of zero
        assert torch.equal(scale, ref_scale), shape
        assert torch.equal(back, ref_dequantize(codes, scale, dtype=torch.float32)), shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, kind, layout):
    quantize, _, ref_quantize, _ = KINDS[kind]
    x = spread((130, 70), torch.float32, device, layout)
    for found, expected in zip(quantize(x), ref_quantize(x), strict=True):
        assert found.is_contiguous()
        assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_within_half_a_step(device, kind):
    quantize, dequantize, *_ = KINDS[kind]
    x = spread((200, 150), torch.float32, device)
    codes, scale = quantize(x)
    back = dequantize(codes, scale, dtype=torch.float32)
    smallest = float(scale.max()) * 2**-10  # half of the smallest subnormal
    assert bool(((back - x).abs() <= x.abs() * 2**-4 * 1.0001 + smallest).all())
    assert float(codes.float().abs().max()) == 448.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dequantize_into_a_buffer(device, kind, dtype):
    quantize, dequantize, _, ref_dequantize = KINDS[kind]
    codes, scale = quantize(spread((130, 70), torch.float32, device))
    out = torch.empty(130, 70, dtype=dtype, device=device)
    assert dequantize(codes, scale, dtype=dtype, out=out) is out
    assert torch.equal(out, ref_dequantize(codes, scale, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter: inf times 0
def test_a_bad_value_shows_in_its_scale(device, kind, bad):
    quantize, dequantize, *_ = KINDS[kind]
    x = spread((3, 40), torch.float32, device)
    x[2, 5] = bad
    codes, scale = quantize(x)
    assert not scale.isfinite().all()
    assert dequantize(codes, scale, dtype=torch.float32)[2].isnan().any()


def test_leading_dimensions(device):
    x = spread((6, 40), torch.float32, device).view(2, 3, 40)
    codes, scale = ops.fp8_quantize_rows(x)
    assert codes.shape == (2, 3, 40) and scale.shape == (2, 3)
    assert torch.equal(
        ops.fp8_dequantize_rows(codes, scale, dtype=torch.float32),
        reference.fp8_dequantize_rows(codes, scale, dtype=torch.float32),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_break(device, backend, kind):
    if device == "cuda":
        torch._dynamo.reset()
    quantize, dequantize, *_ = KINDS[kind]

    def there_and_back(x):
        return dequantize(*quantize(x), dtype=torch.float32)

    x = spread((20, 150), torch.float32, device)
    assert torch.equal(torch.compile(there_and_back, fullgraph=True, backend=backend)(x), there_and_back(x))


@pytest.mark.gpu
def test_cuda_graph_capture():
    x = spread((256, 512), torch.bfloat16, "cuda")
    for quantize, dequantize, *_ in KINDS.values():
        expected = dequantize(*quantize(x), dtype=torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = dequantize(*quantize(x), dtype=torch.bfloat16)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)


def test_wrong_arguments_are_refused():
    codes, scale = torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(4)
    with pytest.raises(TypeError, match="x must have dtype .* received int32"):
        ops.fp8_quantize_rows(torch.zeros(4, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="x must have 2 dimensions"):
        ops.fp8_quantize_blocks(torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match=r"scale must have shape \(4\); received \(3,\)"):
        ops.fp8_dequantize_rows(codes, scale[:3], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"scale must have shape \(1, 1\); received \(4,\)"):
        ops.fp8_dequantize_blocks(codes, scale, dtype=torch.float32)
    with pytest.raises(TypeError, match="codes must have dtype float8_e4m3fn; received float32"):
        ops.fp8_dequantize_rows(torch.zeros(4, 8), scale, dtype=torch.float32)
    with pytest.raises(ValueError, match="out must be contiguous with shape"):
        ops.fp8_dequantize_rows(codes, scale, dtype=torch.float32, out=torch.zeros(8, 4))
    with pytest.raises(TypeError, match="out must have dtype"):
        ops.fp8_dequantize_rows(codes, scale, dtype=torch.int32)
