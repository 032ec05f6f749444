"""RMSNorm against its reference: values and gradients, layouts, sizes, roundings, errors, torch.compile, CUDA
graphs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.ops._sum_rows import slices_for
from dropforge_kernels.testing import DTYPES, LAYOUTS, assert_parity, capture_and_replay, random_tensor, row_shapes

FLAVOURS = [("llama", 0.0), ("gemma", 1.0)]


def inputs(shape, dtype, device, layout="contiguous", weight_dtype=None):
    x = random_tensor(shape, dtype=dtype, device=device, layout=layout, scale=2.0)
    weight = random_tensor(shape[-1:], dtype=weight_dtype or dtype, device=device, seed=1)
    # A row of one element is +-1 whatever it was, and its gradient vanishes with eps: a large eps keeps it a number.
    return {"x": x, "weight": weight, "eps": 0.5 if shape[-1] == 1 else 1e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rounding", "offset"), FLAVOURS)
def test_values_and_gradients_over_the_shape_grid(device, dtype, rounding, offset):
    for rows, width in row_shapes(device):
        given = inputs((rows, width), dtype, device) | {"rounding": rounding, "offset": offset}
        assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("x", "weight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rounding", "offset"), FLAVOURS)
def test_residual_addition_over_the_shape_grid(device, dtype, rounding, offset):
    for rows, width in row_shapes(device):
        given = inputs((rows, width), dtype, device) | {"rounding": rounding, "offset": offset}
        given["residual"] = random_tensor((rows, width), dtype=dtype, device=device, seed=2)
        assert_parity(ops.add_rms_norm, reference.add_rms_norm, given, grad=("x", "residual", "weight"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_three_dimensions(device, layout):
    given = inputs((3, 5, 40), torch.bfloat16, device, layout)
    assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("x", "weight"))
    given["residual"] = random_tensor((3, 5, 40), dtype=torch.bfloat16, device=device, seed=2, layout=layout)
    assert_parity(ops.add_rms_norm, reference.add_rms_norm, given, grad=("x", "residual", "weight"))


def test_frozen_weight_gives_no_weight_gradient_and_the_same_input_gradient(device):
    given = inputs((5, 48), torch.float32, device)
    assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("x",))
    assert_parity(ops.rms_norm, reference.rms_norm, given | {"weight": None}, grad=("x",))
    assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("weight",))


def test_fp32_weight_beside_bf16_activations(device):
    given = inputs((5, 48), torch.bfloat16, device, weight_dtype=torch.float32)
    assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("x", "weight"))


def test_only_one_output_used(device):
    given = inputs((5, 48), torch.float32, device)
    given["residual"] = random_tensor((5, 48), dtype=torch.float32, device=device, seed=2)
    for index in (0, 1):
        leaf = given["x"].clone().requires_grad_()
        (ours,) = torch.autograd.grad(ops.add_rms_norm(**(given | {"x": leaf}))[index].square().sum(), leaf)
        (truth,) = torch.autograd.grad(reference.add_rms_norm(**(given | {"x": leaf}))[index].square().sum(), leaf)
        torch.testing.assert_close(ours, truth)


def test_llama_and_gemma_round_differently(device):
    given = inputs((16, 64), torch.float16, device)
    llama, gemma = (ops.rms_norm(**given, rounding=r) for r in ("llama", "gemma"))
    assert not torch.equal(llama, gemma)
    assert torch.equal(llama, reference.rms_norm(**given, rounding="llama"))


def test_autocast_keeps_the_dtype_of_x(device):
    given = inputs((5, 48), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.rms_norm(**given).dtype is torch.float32
        assert_parity(ops.rms_norm, reference.rms_norm, given, grad=("x", "weight"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    if device == "cuda":
        torch._dynamo.reset()

    def block(x, residual, weight, kind=ops):
        y, s = kind.add_rms_norm(x * 2, residual, weight, eps=1e-6)
        return kind.rms_norm(y, weight, eps=1e-6) + s

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    given = inputs((6, 32), torch.float32, device)
    given["residual"] = random_tensor((6, 32), dtype=torch.float32, device=device, seed=2)
    del given["eps"]
    assert_parity(compiled, partial(block, kind=reference), given, grad=("x", "residual", "weight"))


@pytest.mark.gpu
def test_cuda_graph_capture():
    def build():
        given = inputs((64, 256), torch.bfloat16, "cuda")
        x = given["x"].requires_grad_()

        def step():
            y = ops.rms_norm(**given)
            return y, *torch.autograd.grad(y, x, torch.ones_like(y))

        return step

    capture_and_replay(build)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.ones(31)}, ValueError, r"weight must have shape \(32\); received \(31,\)"),
        ({"x": torch.ones(4, 32, dtype=torch.int32)}, TypeError, "x must have dtype .*; received int32"),
        ({"weight": torch.ones(32, dtype=torch.float64)}, TypeError, "weight must have dtype"),
        ({"weight": torch.ones(32, device="meta")}, ValueError, "one device"),
        ({"rounding": "t5"}, ValueError, "rounding must be one of 'llama', 'gemma'; received 't5'"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"weight": torch.ones(64)[::2]}, ValueError, "weight must be contiguous"),
        ({"x": torch.ones(4, 0), "weight": torch.ones(0)}, ValueError, "between 1 and 65536; received 0"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = {"x": torch.ones(4, 32), "weight": torch.ones(32), "eps": 1e-6} | change
    with pytest.raises(error, match=text):
        ops.rms_norm(**given)


def test_residual_must_match():
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        ops.add_rms_norm(torch.ones(4, 32), torch.ones(1, 32), torch.ones(32), eps=1e-6)


@pytest.mark.parametrize("multiprocessors", [1, 16, 20, 48, 84, 108, 127, 128, 132, 188])
def test_programs_that_wait_leave_room_for_those_they_wait_for(multiprocessors):
    """One program at least fits on a multiprocessor; if all of them waited, the rest would never start."""
    waiting = slices_for(multiprocessors) - 1
    assert 0 <= waiting < multiprocessors
    if multiprocessors < 128:  # two streams at once; larger GPUs hold two such programs on each multiprocessor
        assert 2 * waiting < multiprocessors
