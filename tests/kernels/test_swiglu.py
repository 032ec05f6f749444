"""SwiGLU, packed and clamped forms against their references: values, gradients, layouts, in place, errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, LAYOUTS, assert_parity, capture_and_replay, random_tensor, row_shapes


def pair(shape, dtype, device, layout="contiguous"):
    return {
        "gate": random_tensor(shape, dtype=dtype, device=device, layout=layout, scale=2.0),
        "up": random_tensor(shape, dtype=dtype, device=device, layout=layout, seed=1, scale=2.0),
    }


def packed(shape, dtype, device, layout="contiguous", scale=2.0):
    shape = (*shape[:-1], 2 * shape[-1])
    return {"gate_up": random_tensor(shape, dtype=dtype, device=device, layout=layout, scale=scale)}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_over_the_shape_grid(device, dtype, inplace):
    for rows, width in row_shapes(device):
        shape = (rows, width)
        given = pair(shape, dtype, device)
        assert_parity(partial(ops.swiglu, inplace=inplace), reference.swiglu, given, grad=("gate", "up"))
        given = packed(shape, dtype, device)
        assert_parity(partial(ops.swiglu_packed, inplace=inplace), reference.swiglu_packed, given, grad=("gate_up",))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamped_over_the_shape_grid(device, dtype, interleaved, inplace):
    ours = partial(ops.swiglu_clamped, interleaved=interleaved, inplace=inplace)
    truth = partial(reference.swiglu_clamped, interleaved=interleaved)
    for rows, width in row_shapes(device):
        # Scale 6 puts about a quarter of the values beyond the limit of 7.
        assert_parity(ours, truth, packed((rows, width), dtype, device, scale=6.0), grad=("gate_up",))


def test_gradient_at_the_clamp_edge_passes_and_beyond_is_zero(device):
    values = torch.tensor([[7.0, 7.0], [7.5, 8.0], [-9.0, -7.0], [1.0, -7.5]], device=device)
    assert_parity(ops.swiglu_clamped, reference.swiglu_clamped, {"gate_up": values}, grad=("gate_up",))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_three_dimensions(device, layout, inplace):
    given = pair((3, 5, 40), torch.bfloat16, device, layout)
    assert_parity(partial(ops.swiglu, inplace=inplace), reference.swiglu, given, grad=("gate", "up"))
    given = packed((3, 5, 40), torch.bfloat16, device, layout)
    assert_parity(partial(ops.swiglu_packed, inplace=inplace), reference.swiglu_packed, given, grad=("gate_up",))
    assert_parity(partial(ops.swiglu_clamped, inplace=inplace), reference.swiglu_clamped, given, grad=("gate_up",))


def test_in_place_backward_writes_the_gradients_over_the_inputs_once(device):
    given = pair((4, 8), torch.float32, device)
    gate, up = (t.clone().requires_grad_() for t in given.values())
    hidden_gate, hidden_up = gate * 1, up * 1
    h = ops.swiglu(hidden_gate, hidden_up, inplace=True)
    h.sum().backward(retain_graph=True)
    torch.testing.assert_close(hidden_gate.detach(), gate.grad)
    torch.testing.assert_close(hidden_up.detach(), up.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_in_place_backward_is_noticed_by_an_operation_that_saved_the_gate(device):
    gate, up = (t.clone().requires_grad_() for t in pair((4, 8), torch.float32, device).values())
    hidden = gate * 1
    also = hidden.square()  # saves hidden, and its backward runs after the activation's
    h = ops.swiglu(hidden, up * 1, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (also.sum() + h.sum()).backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_launch_with_product(device, inplace):
    given = pair((5, 48), torch.float32, device)
    dh = random_tensor((5, 48), dtype=torch.float32, device=device, seed=3)
    expected = reference.swiglu_backward(dh, **given, product=True)
    buffers = [t.clone() for t in (dh, *given.values())]
    outputs = ops.swiglu_backward(*buffers, product=True, inplace=inplace)
    torch.testing.assert_close(outputs, expected)
    assert (outputs[0].data_ptr() == buffers[1].data_ptr()) is inplace
    assert ops.swiglu_backward(dh, **given)[2] is None


def test_autocast_keeps_the_dtype(device):
    given = pair((5, 48), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.swiglu(**given).dtype is torch.float32
        assert_parity(ops.swiglu, reference.swiglu, given, grad=("gate", "up"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    torch._dynamo.reset()

    def block(gate, up, gate_up, kind=ops):
        return kind.swiglu(gate * 2, up, inplace=True) + kind.swiglu_packed(gate_up) + kind.swiglu_clamped(gate_up)

    given = pair((4, 8), torch.float32, device) | packed((4, 8), torch.float32, device)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert_parity(compiled, partial(block, kind=reference), given, grad=("gate", "up", "gate_up"))


@pytest.mark.gpu
def test_cuda_graph_capture():
    def build():
        given = pair((64, 512), torch.bfloat16, "cuda")
        gate = given["gate"].requires_grad_()

        def step():
            h = ops.swiglu(**given)
            return h, *torch.autograd.grad(h, gate, torch.ones_like(h))

        return step

    capture_and_replay(build)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    size = 2**31 + 4097
    gate = torch.randn(size, dtype=torch.bfloat16, device="cuda")
    tail = gate[-4097:].clone()
    h = ops.swiglu(gate, gate)
    torch.testing.assert_close(h[-4097:], reference.swiglu(tail, tail))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.swiglu(torch.ones(4, 8), torch.ones(4, 7)), ValueError, r"shape of gate \(4, 8\); received"),
        (lambda: ops.swiglu(torch.ones(4, 8), torch.ones(4, 8).half()), TypeError, "up must have the dtype of gate"),
        (lambda: ops.swiglu(torch.ones(4, dtype=torch.int32), torch.ones(4)), TypeError, "gate must have dtype"),
        (lambda: ops.swiglu_packed(torch.ones(4, 7)), ValueError, r"even last dimension .* received \(4, 7\)"),
        (lambda: ops.swiglu_clamped(torch.ones(4, 8), limit=0.0), ValueError, "limit must be positive"),
        (lambda: ops.swiglu(torch.ones(4, 0), torch.ones(4, 0)), ValueError, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()
