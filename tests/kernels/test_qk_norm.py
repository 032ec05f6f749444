"""QK-norm, alone and fused with RoPE, against its reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, assert_parity, capture_and_replay, random_tensor

FLAVOURS = [("llama", 0.0), ("gemma", 1.0)]
CPU_SHAPES = [((0, 2, 8), 1), ((1, 1, 5), 1), ((5, 3, 12), 2), ((2, 3, 4, 16), 2)]
GPU_SHAPES = [*CPU_SHAPES, ((333, 16, 128), 8), ((2, 257, 24, 96), 4), ((4099, 8, 256), 4), ((70, 40, 80), 10)]
WEIGHTS = ("q", "k", "q_weight", "k_weight")


def shapes(device):
    return CPU_SHAPES if device == "cpu" else GPU_SHAPES


def inputs(shape, kv_heads, dtype, device, *, rotate, pairs=None, layout="contiguous"):
    tokens, width = shape[:-2], shape[-1]
    given = {
        "q": random_tensor(shape, dtype=dtype, device=device, layout=layout),
        "k": random_tensor((*tokens, kv_heads, width), dtype=dtype, device=device, seed=1, layout=layout),
        "q_weight": random_tensor((width,), dtype=dtype, device=device, seed=2),
        "k_weight": random_tensor((width,), dtype=dtype, device=device, seed=3),
        "eps": 1e-6,
    }
    if rotate:
        angles = torch.arange(torch.Size(tokens).numel())[:, None] * 0.7 / (1 + torch.arange(pairs or width // 2))
        given |= {"cos": angles.cos().to(device), "sin": angles.sin().to(device)}
    return given


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rounding", "offset"), FLAVOURS)
def test_norm_over_the_shape_grid(device, dtype, rounding, offset):
    for shape, kv_heads in shapes(device):
        given = inputs(shape, kv_heads, dtype, device, rotate=False) | {"rounding": rounding, "offset": offset}
        assert_parity(ops.qk_norm, reference.qk_norm, given, grad=WEIGHTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rounding", "offset"), FLAVOURS)
def test_norm_and_rotation_over_the_shape_grid(device, dtype, rounding, offset):
    for shape, kv_heads in shapes(device):
        given = inputs(shape, kv_heads, dtype, device, rotate=True) | {"rounding": rounding, "offset": offset}
        assert_parity(ops.qk_norm_rope, reference.qk_norm_rope, given, grad=WEIGHTS)
        assert_parity(ops.qk_norm_rope, reference.qk_norm_rope, given, grad=("q", "k"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_positions_and_pairing(device, interleaved):
    given = inputs((6, 3, 20), 2, torch.float32, device, rotate=True, pairs=3)
    given |= {"interleaved": interleaved, "positions": torch.tensor([0, 1, 2, 0, 1, 0], device=device)}
    assert_parity(ops.qk_norm_rope, reference.qk_norm_rope, given, grad=WEIGHTS)


def test_strided_layouts_and_no_weights(device):
    joint = random_tensor((6, 4 * 8 + 2 * 8), dtype=torch.bfloat16, device=device)
    given = inputs((6, 4, 8), 2, torch.bfloat16, device, rotate=True)
    given |= {"q": joint[:, :32].view(6, 4, 8), "k": joint[:, 32:].view(6, 2, 8)}
    assert_parity(ops.qk_norm_rope, reference.qk_norm_rope, given, grad=WEIGHTS)
    given |= {"q_weight": None, "k_weight": None}
    assert_parity(ops.qk_norm_rope, reference.qk_norm_rope, given, grad=("q", "k"))
    transposed = inputs((6, 4, 8), 4, torch.bfloat16, device, rotate=False, layout="transposed")
    assert_parity(ops.qk_norm, reference.qk_norm, transposed, grad=WEIGHTS)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rotate", [False, True])
def test_compiles_without_graph_break(device, backend, rotate):
    torch._dynamo.reset()

    def block(q, k, q_weight, k_weight, cos=None, sin=None, kind=ops):
        if cos is None:
            return kind.qk_norm(q * 2, k, q_weight, k_weight, eps=1e-6)
        return kind.qk_norm_rope(q * 2, k, q_weight, k_weight, cos, sin, eps=1e-6)

    given = inputs((4, 2, 8), 1, torch.float32, device, rotate=rotate)
    del given["eps"]
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert_parity(compiled, partial(block, kind=reference), given, grad=WEIGHTS)


@pytest.mark.gpu
def test_cuda_graph_capture():
    def build():
        given = inputs((64, 8, 128), 2, torch.bfloat16, "cuda", rotate=True)
        q = given["q"].requires_grad_()

        def step():
            outputs = ops.qk_norm_rope(**given)
            return *outputs, *torch.autograd.grad(outputs[0], q, torch.ones_like(outputs[0]))

        return step

    capture_and_replay(build)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q_weight": None}, ValueError, "must both be given or both be None"),
        ({"k_weight": torch.ones(7)}, ValueError, r"k_weight must have shape \(8\); received \(7,\)"),
        ({"rounding": "t5"}, ValueError, "rounding must be one of"),
        ({"eps": -1.0}, ValueError, "eps must be positive"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = inputs((4, 2, 8), 1, torch.float32, "cpu", rotate=False) | change
    with pytest.raises(error, match=text):
        ops.qk_norm(**given)
