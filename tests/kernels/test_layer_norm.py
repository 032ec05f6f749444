"""LayerNorm against its reference: values and gradients, layouts, sizes, errors, torch.compile."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, LAYOUTS, assert_parity, random_tensor, row_shapes

ALL = ("x", "weight", "bias")


def inputs(shape, dtype, device, layout="contiguous"):
    return {
        "x": random_tensor(shape, dtype=dtype, device=device, layout=layout, scale=2.0) + 1,
        "weight": random_tensor(shape[-1:], dtype=dtype, device=device, seed=1),
        "bias": random_tensor(shape[-1:], dtype=dtype, device=device, seed=2),
        "eps": 1e-5,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_over_the_shape_grid(device, dtype):
    for rows, width in row_shapes(device):
        if width == 1:  # x - mean(x) is zero whatever x is: only the bias has a gradient
            grad = ("bias",)
        else:
            grad = ALL
        assert_parity(ops.layer_norm, reference.layer_norm, inputs((rows, width), dtype, device), grad=grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_missing_bias(device, layout):
    given = inputs((3, 5, 40), torch.bfloat16, device, layout)
    assert_parity(ops.layer_norm, reference.layer_norm, given, grad=ALL)
    assert_parity(ops.layer_norm, reference.layer_norm, given | {"bias": None}, grad=("x", "weight"))


@pytest.mark.parametrize("grad", [("x",), ("weight",), ("bias",)])
def test_each_gradient_alone(device, grad):
    assert_parity(ops.layer_norm, reference.layer_norm, inputs((5, 48), torch.float32, device), grad=grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    torch._dynamo.reset()

    def block(x, weight, bias, kind=ops):
        return kind.layer_norm(x * 2, weight, bias, eps=1e-5) + 1

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    given = inputs((6, 32), torch.float32, device)
    del given["eps"]
    assert_parity(compiled, partial(block, kind=reference), given, grad=ALL)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"bias": torch.ones(31)}, ValueError, r"bias must have shape \(32\); received \(31,\)"),
        ({"x": torch.ones(4, 32, dtype=torch.int32)}, TypeError, "x must have dtype"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        ops.layer_norm(**(inputs((4, 32), torch.float32, "cpu") | change))
