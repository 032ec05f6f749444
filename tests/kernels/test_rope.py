"""RoPE against its reference: values and gradients, tables and positions, layouts, in place, errors, compile,
graphs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, assert_parity, capture_and_replay, random_tensor


def table(rows, pairs, device, dtype=torch.float32):
    angles = torch.arange(rows)[:, None] * 0.7 / (1 + torch.arange(pairs))
    return {"cos": angles.cos().to(device, dtype), "sin": angles.sin().to(device, dtype)}


def inputs(shape, kv_heads, dtype, device, pairs=None, layout="contiguous"):
    tokens, width = shape[:-2], shape[-1]
    return {
        "q": random_tensor(shape, dtype=dtype, device=device, layout=layout),
        "k": random_tensor((*tokens, kv_heads, width), dtype=dtype, device=device, seed=1, layout=layout),
        **table(torch.Size(tokens).numel(), pairs or width // 2, device),
    }


CPU_SHAPES = [((0, 2, 8), 1), ((1, 1, 2), 1), ((5, 3, 12), 2), ((2, 3, 4, 16), 2)]
GPU_SHAPES = [*CPU_SHAPES, ((333, 32, 128), 8), ((2, 257, 24, 96), 4), ((130, 8, 256), 4), ((70, 40, 80), 10)]


def shapes(device):
    return CPU_SHAPES if device == "cpu" else GPU_SHAPES


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_over_the_shape_grid(device, dtype, interleaved):
    for shape, kv_heads in shapes(device):
        given = inputs(shape, kv_heads, dtype, device) | {"interleaved": interleaved}
        assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_passes_the_rest_through(device, interleaved):
    given = inputs((6, 3, 20), 2, torch.bfloat16, device, pairs=3) | {"interleaved": interleaved}
    assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))
    q, _ = ops.rope(**given)
    assert torch.equal(q[..., 6:], given["q"][..., 6:])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_positions_restart_at_each_document(device, index_dtype):
    positions = torch.tensor([0, 1, 2, 0, 1, 0], dtype=index_dtype, device=device)
    for shape, where in [((6, 2, 8), positions), ((2, 3, 2, 8), positions.view(2, 3))]:
        given = inputs(shape, 1, torch.float32, device) | table(3, 4, device) | {"positions": where}
        assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))


def test_position_outside_the_table_gives_nan_not_garbage(device):
    given = inputs((3, 2, 8), 1, torch.float32, device) | table(2, 4, device)
    q, _ = ops.rope(**given, positions=torch.tensor([0, 2, -1], device=device))
    assert q[0].isfinite().all()
    assert q[1:].isnan().all()


def test_strided_layouts(device):
    joint = random_tensor((6, 4 * 8 + 2 * 8), dtype=torch.bfloat16, device=device)  # a joint projection's slices
    given = {"q": joint[:, :32].view(6, 4, 8), "k": joint[:, 32:].view(6, 2, 8), **table(6, 4, device)}
    assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))
    heads_first = inputs((2, 4, 3, 8), 3, torch.bfloat16, device)  # (B, H, S, D) storage seen as (B, S, H, D)
    given = {n: heads_first[n].transpose(1, 2) for n in ("q", "k")} | table(6, 4, device)
    given["q"], given["k"] = given["q"][:, :4], given["k"][:, :4]
    given |= table(given["q"].shape[0] * given["q"].shape[1], 4, device)
    assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))
    assert_parity(ops.rope, reference.rope, inputs((6, 2, 8), 2, torch.bfloat16, device, layout="transposed"))
    wide = table(6, 8, device)  # tables that repeat each angle, cut to the first half
    given = inputs((6, 2, 8), 2, torch.bfloat16, device) | {n: t[:, :4] for n, t in wide.items()}
    assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))


def test_bf16_table(device):
    given = inputs((6, 2, 8), 2, torch.bfloat16, device) | table(6, 4, device, torch.bfloat16)
    assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))


def test_in_place_overwrites_and_matches(device):
    given = inputs((6, 2, 12), 1, torch.float32, device, pairs=4)
    expected = reference.rope(**given)
    q, k = given["q"].clone(), given["k"].clone()
    outputs = ops.rope(**(given | {"q": q, "k": k}), inplace=True)
    assert outputs[0].data_ptr() == q.data_ptr()
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close((q, k), expected)
    assert_parity(partial(ops.rope, inplace=True), reference.rope, given, grad=("q", "k"))


def test_backward_of_one_output_only(device):
    given = inputs((4, 2, 8), 1, torch.float32, device)
    q = given["q"].clone().requires_grad_()
    (ours,) = torch.autograd.grad(ops.rope(**(given | {"q": q}))[0].square().sum(), q)
    (truth,) = torch.autograd.grad(reference.rope(**(given | {"q": q}))[0].square().sum(), q)
    torch.testing.assert_close(ours, truth)


def test_autocast_keeps_the_dtype(device):
    given = inputs((4, 2, 8), 1, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.rope(**given)[0].dtype is torch.float32
        assert_parity(ops.rope, reference.rope, given, grad=("q", "k"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    torch._dynamo.reset()
    positions = torch.tensor([0, 1, 0, 1], device=device)

    def block(q, k, cos, sin, kind=ops):
        q, k = kind.rope(q * 2, k, cos, sin, positions=positions, inplace=True)
        return q + 1, k

    given = inputs((4, 2, 8), 1, torch.float32, device)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert_parity(compiled, partial(block, kind=reference), given, grad=("q", "k"))


@pytest.mark.gpu
def test_cuda_graph_capture():
    def build():
        given = inputs((64, 8, 128), 2, torch.bfloat16, "cuda")
        return lambda: ops.rope(**given)

    capture_and_replay(build)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    tokens, heads, width = 2**31 // (32 * 128) + 3, 32, 128
    q = torch.randn(tokens, heads, width, dtype=torch.bfloat16, device="cuda")
    tail = q[-4:].clone()
    k = q[:, :1].contiguous()
    positions = torch.arange(tokens, device="cuda") % 64
    angles = table(64, 64, "cuda")
    ops.rope(q, k, **angles, positions=positions, inplace=True)
    expected, _ = reference.rope(tail, tail[:, :1], **angles, positions=positions[-4:])
    torch.testing.assert_close(q[-4:], expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": torch.ones(4, 1, 6)}, ValueError, r"k must have shape \(4, H, 8\); received \(4, 1, 6\)"),
        ({"k": torch.ones(3, 1, 8)}, ValueError, "k must have shape"),
        ({"k": torch.ones(4, 1, 8, dtype=torch.float16)}, TypeError, "k must have the dtype of q"),
        ({"q": torch.ones(4, 8), "k": torch.ones(4, 8)}, ValueError, r"\(B, S, H, D\) or \(T, H, D\)"),
        ({"cos": torch.ones(4, 5), "sin": torch.ones(4, 5)}, ValueError, "between 1 and 4 columns"),
        ({"cos": torch.ones(3, 4), "sin": torch.ones(3, 4)}, ValueError, r"cos must have shape \(4, P\)"),
        ({"sin": torch.ones(4, 3)}, ValueError, "sin must have the shape of cos"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, ValueError, r"positions must have shape \(4,\)"),
        ({"positions": torch.zeros(4)}, TypeError, "positions must have dtype int32, int64; received float32"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = inputs((4, 2, 8), 1, torch.float32, "cpu") | change
    with pytest.raises(error, match=text):
        ops.rope(**given)
