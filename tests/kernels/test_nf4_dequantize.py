"""NF4 dequantisation is bit-identical to bitsandbytes and to the reference, into any buffer."""

from __future__ import annotations

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, poisoned_memory, random_tensor


def sizes(device):
    if device == "cpu":
        return ((1, 1), (3, 7), (64, 64), (130, 130))
    return ((1, 1), (3, 7), (64, 64), (129, 77), (1000, 1001), (1024, 4096), (14336, 4096))


def fields(shape, device, *, nested=True, blocksize=64):
    """What bitsandbytes stores, made by plain arithmetic: random codes and scales, every byte value present."""
    generator = torch.Generator().manual_seed(sum(shape))
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    packed = torch.randint(0, 256, (-(-numel // 2), 1), generator=generator).to(torch.uint8)
    code = torch.linspace(-1, 1, 16) ** 3
    if not nested:
        absmax = torch.rand(blocks, generator=generator)
        return {"packed": packed.to(device), "absmax": absmax.to(device), "code": code.to(device), "shape": shape}
    found = {
        "packed": packed,
        "absmax": torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8),
        "code": code,
        "nested_absmax": torch.rand(-(-blocks // 256), generator=generator),
        "nested_code": torch.rand(256, generator=generator).sort().values * 2 - 1,
        "nested_offset": torch.tensor(0.03712),
    }
    return {k: v.to(device) for k, v in found.items()} | {"shape": shape, "blocksize": blocksize}


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


@pytest.fixture
def exact_casts(device, dtype):
    if device == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bf16 off instead of rounding; fp32 and fp16 are exact there")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_bits_equal_the_reference(device, dtype, nested, exact_casts):
    for shape in sizes(device):
        given = fields(shape, device, nested=nested) | {"dtype": dtype}
        with poisoned_memory():
            found = ops.nf4_dequantize(**given)
        assert torch.equal(bits(found), bits(reference.nf4_dequantize(**given))), shape


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_other_block_sizes(device, blocksize):
    given = fields((70, 130), device, blocksize=blocksize) | {"dtype": torch.float32}
    assert torch.equal(ops.nf4_dequantize(**given), reference.nf4_dequantize(**given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.filterwarnings("ignore")
def test_bits_equal_bitsandbytes(device, dtype, nested, exact_casts):
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in sizes(device):
        weight = random_tensor(shape, dtype=dtype, device=device, scale=0.05)
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
        given = {"packed": packed, "absmax": state.absmax, "code": state.code, "shape": shape, "dtype": dtype}
        if nested:
            given |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
            given |= {"nested_offset": state.offset}
        expected = functional.dequantize_4bit(packed, state)
        assert torch.equal(bits(ops.nf4_dequantize(**given)), bits(expected)), shape


def test_writes_into_the_buffer_and_nothing_beside_it(device):
    given = fields((3, 7), device) | {"dtype": torch.float16}
    scratch = torch.full((40,), 7.0, dtype=torch.float16, device=device)
    out = scratch[8:29].view(3, 7)
    assert ops.nf4_dequantize(**given, out=out) is out
    assert torch.equal(out, reference.nf4_dequantize(**given))
    assert bool((scratch[:8] == 7).all()) and bool((scratch[29:] == 7).all())


def test_empty(device):
    given = fields((0, 7), device) | {"dtype": torch.float16}
    assert ops.nf4_dequantize(**given).shape == (0, 7)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    if device == "cuda":
        torch._dynamo.reset()
    given = fields((6, 70), device) | {"dtype": torch.float32}
    out = torch.zeros(6, 70, device=device)

    def use(x):
        return x * ops.nf4_dequantize(**given, out=out), ops.nf4_dequantize(**given)

    x = random_tensor((6, 70), dtype=torch.float32, device=device)
    product, fresh = torch.compile(use, fullgraph=True, backend=backend)(x)
    expected = reference.nf4_dequantize(**given)
    assert torch.equal(out, expected) and torch.equal(fresh, expected)
    torch.testing.assert_close(product, x * expected)


@pytest.mark.gpu
def test_cuda_graph_capture():
    given = fields((64, 4096), "cuda") | {"dtype": torch.bfloat16}
    expected = reference.nf4_dequantize(**given)
    out = torch.zeros_like(expected)
    ops.nf4_dequantize(**given, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.nf4_dequantize(**given, out=out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    shape = (33600, 65536)  # 2.2e9
    given = fields(shape, "cuda") | {"dtype": torch.bfloat16}
    tail = given | {"shape": (256, 65536)}
    blocks, values = 256 * 1024, 256 * 65536
    tail |= {"packed": given["packed"][-values // 2 :], "absmax": given["absmax"][-blocks:]}
    tail["nested_absmax"] = given["nested_absmax"][-blocks // 256 :]
    assert torch.equal(ops.nf4_dequantize(**given)[-256:], reference.nf4_dequantize(**tail))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"packed": torch.zeros(9, dtype=torch.uint8)}, r"packed must have 11 values of torch.uint8 .* received 9"),
        ({"absmax": torch.zeros(1)}, "absmax must have 1 values of torch.uint8 .* of torch.float32"),
        ({"code": torch.zeros(8)}, "code must have 16 values of torch.float32 .* received 8"),
        ({"nested_code": torch.zeros(16)}, "nested_code must have 256 values"),
        ({"nested_code": None}, "must be given together"),
        ({"blocksize": 48}, "blocksize must be a power of two of at least 2; received 48"),
        ({"out": torch.zeros(7, 3)}, r"out must have shape \(3, 7\) and dtype torch.float32; received \(7, 3\)"),
        ({"out": torch.zeros(7, 3).t()}, "out must be contiguous"),
        ({"shape": (2**40,)}, "packed must have"),
    ],
)
def test_wrong_arguments_are_refused(change, text):
    given = fields((3, 7), "cpu") | {"dtype": torch.float32}
    if "shape" in change:
        given |= {"out": torch.empty(1, device="meta").expand(2**40)}
    with pytest.raises((ValueError, TypeError), match=text):
        ops.nf4_dequantize(**(given | change))
