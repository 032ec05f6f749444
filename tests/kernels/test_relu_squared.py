"""Squared ReLU against its reference: values and gradients, layouts, edges, compile, capture, errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, LAYOUTS, assert_parity, capture_and_replay, random_tensor, row_shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_over_the_shape_grid(device, dtype):
    for shape in row_shapes(device):
        given = {"x": random_tensor(shape, dtype=dtype, device=device)}
        assert_parity(ops.relu_squared, reference.relu_squared, given, grad=("x",))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    given = {"x": random_tensor((3, 5, 40), dtype=torch.float16, device=device, layout=layout)}

    def turned(run, x):
        return run(x).transpose(0, 1)  # the gradient comes back with other strides

    assert_parity(partial(turned, ops.relu_squared), partial(turned, reference.relu_squared), given, grad=("x",))


def test_at_and_around_zero_and_at_infinity(device):
    x = torch.tensor([-3e38, -1.0, -0.0, 0.0, 1e-15, 2.0, float("inf"), float("nan")], device=device)
    leaf = x.clone().requires_grad_()
    h = ops.relu_squared(leaf)
    torch.testing.assert_close(h.detach()[:6], torch.tensor([0.0, 0, 0, 0, 1e-30, 4], device=device), atol=0, rtol=1e-6)
    assert h[6].isinf()
    assert h[7].isnan()
    (slope,) = torch.autograd.grad(h, leaf, torch.ones_like(h))
    assert torch.equal(slope[:6], torch.tensor([0.0, 0, 0, 0, 2e-15, 4], device=device))


def test_autocast_keeps_the_dtype(device):
    x = random_tensor((5, 48), dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.relu_squared(x).dtype is torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    torch._dynamo.reset()

    def block(x, kind=ops):
        return kind.relu_squared(x * 2) + 1

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    given = {"x": random_tensor((4, 8), dtype=torch.float32, device=device)}
    assert_parity(compiled, partial(block, kind=reference), given, grad=("x",))


def test_registered_as_a_custom_op(device):
    x = random_tensor((4, 8), dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.dropforge.relu_squared.default, (x.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.dropforge.relu_squared_backward.default, (torch.ones_like(x), x))


@pytest.mark.gpu
def test_cuda_graph_capture():
    def build():
        x = random_tensor((64, 512), dtype=torch.bfloat16, device="cuda").requires_grad_()

        def step():
            h = ops.relu_squared(x)
            return h, *torch.autograd.grad(h, x, torch.ones_like(h))

        return step

    capture_and_replay(build)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.randn(2**31 + 4097, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(ops.relu_squared(x)[-4097:], reference.relu_squared(x[-4097:]))


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, "x must be a torch.Tensor; received list"),
        (torch.ones(4, dtype=torch.int32), TypeError, "x must have dtype .*; received int32"),
        (torch.tensor(1.0), ValueError, "received a scalar"),
    ],
)
def test_wrong_arguments_are_refused(x, error, text):
    with pytest.raises(error, match=text):
        ops.relu_squared(x)
