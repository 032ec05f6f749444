"""GeGLU, exact and tanh, against its reference. Layouts, capture and in-place rules are shared with test_swiglu."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, LAYOUTS, assert_parity, random_tensor, row_shapes

KINDS = ["none", "tanh"]


def pair(shape, dtype, device, layout="contiguous"):
    return {
        "gate": random_tensor(shape, dtype=dtype, device=device, layout=layout, scale=2.0),
        "up": random_tensor(shape, dtype=dtype, device=device, layout=layout, seed=1, scale=2.0),
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("approximate", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_over_the_shape_grid(device, dtype, approximate, inplace):
    for rows, width in row_shapes(device):
        given = pair((rows, width), dtype, device) | {"approximate": approximate}
        assert_parity(partial(ops.geglu, inplace=inplace), reference.geglu, given, grad=("gate", "up"))


@pytest.mark.parametrize("approximate", KINDS)
def test_far_values(device, approximate):
    gate = torch.tensor([-60.0, -12.0, -5.0, -0.0, 5.0, 12.0, 60.0], device=device)
    given = {"gate": gate, "up": torch.ones_like(gate), "approximate": approximate}
    assert_parity(ops.geglu, reference.geglu, given, grad=("gate", "up"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    given = pair((3, 5, 40), torch.bfloat16, device, layout)
    assert_parity(ops.geglu, reference.geglu, given, grad=("gate", "up"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("approximate", KINDS)
def test_compiles_without_graph_break(device, backend, approximate):
    torch._dynamo.reset()

    def block(gate, up, kind=ops):
        return kind.geglu(gate * 2, up, approximate=approximate)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    given = pair((4, 8), torch.float32, device)
    assert_parity(compiled, partial(block, kind=reference), given, grad=("gate", "up"))


def test_wrong_approximation_is_refused():
    with pytest.raises(ValueError, match="approximate must be one of 'none', 'tanh'; received 'erf'"):
        ops.geglu(torch.ones(4), torch.ones(4), approximate="erf")
