"""Packed attention: the reference against one document at a time, the kernels against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import CONSTANT, assert_parity, capture_and_replay, random_tensor

LENGTHS = [5, 0, 70, 1, 33, 0]
OPTIONS = [{}, {"window": 9}, {"softcap": 2.0}, {"window": 40, "softcap": 5.0}, {"scale": 0.3}]


def inputs(dtype, device, *, heads=2, groups=1, width=16, lengths=LENGTHS):
    tokens = sum(lengths)
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    # q, k and v as slices of one joint projection, as a model has them
    joint = random_tensor((tokens, heads + 2 * groups, width), dtype=dtype, device=device, seed=3)
    q, k, v = joint.split((heads, groups, groups), 1)
    return {"q": q, "k": k, "v": v}, ops.document_bounds(edges, tokens), edges


def test_bounds():
    edges = torch.tensor([0, 2, 2, 5, 5, 5], dtype=torch.int32)
    bounds = ops.document_bounds(edges, 5)
    assert bounds.starts.tolist() == [0, 0, 2, 2, 2]
    assert bounds.ends.tolist() == [2, 2, 5, 5, 5]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_is_attention_document_by_document(options):
    given, bounds, edges = inputs(torch.float32, "cpu")
    got = reference.packed_attention(**given, bounds=bounds, **options)
    want = reference.attention(**given, cu_seqlens=edges, **options)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def grid():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (16, 64, 80, 128, 256):
            for heads, groups in ((4, 2), (3, 3), (8, 1)):
                yield dtype, width, heads, groups


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parity_small(options, device):
    given, bounds, _ = inputs(torch.float32, device)
    run(given, bounds, options)


def test_parity_odd_width_and_one_group(device):
    given, bounds, _ = inputs(torch.float32, device, heads=3, groups=3, width=24, lengths=[3, 40, 2])
    run(given, bounds, {})


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "width", "heads", "groups"), list(grid()), ids=str)
def test_parity_grid(dtype, width, heads, groups, options):
    lengths = [5, 0, 300, 1, 64, 700, 257, 0]
    given, bounds, _ = inputs(dtype, "cuda", heads=heads, groups=groups, width=width, lengths=lengths)
    run(given, bounds, options)


def run(given, bounds, options, constant=None):
    assert_parity(
        partial(ops.packed_attention, bounds=bounds, **options),
        partial(reference.packed_attention, bounds=bounds, **options),
        given,
        grad=("q", "k", "v"),
        constant=constant or 2 * CONSTANT[given["q"].dtype],
    )


def test_parity_narrow_heads_and_strided_gradient(device):
    given, bounds, _ = inputs(torch.float32, device, heads=2, groups=2, width=8, lengths=[3, 20])

    def turned(run, q, k, v):
        return run(q, k, v, bounds=bounds).transpose(0, 2)  # the gradient comes back with other strides

    assert_parity(
        partial(turned, ops.packed_attention), partial(turned, reference.packed_attention), given, grad=("q", "k", "v")
    )


def test_no_tokens(device):
    given, bounds, _ = inputs(torch.float32, device, lengths=[0, 0])
    run(given, bounds, {})
    assert ops.packed_attention(**given, bounds=bounds).shape == (0, 2, 16)


def test_autocast_casts_fp32(device):
    given, bounds, _ = inputs(torch.float32, device)
    with torch.autocast(device, dtype=torch.float16):  # the interpreter has no products in bf16
        assert ops.packed_attention(**given, bounds=bounds).dtype is torch.float16
        run(given, bounds, {}, constant=4 * CONSTANT[torch.float16])
        # a rotation in fp32 leaves q and k wider than v
        mixed = given | {"v": given["v"].half()}
        assert torch.equal(ops.packed_attention(**mixed, bounds=bounds), ops.packed_attention(**given, bounds=bounds))
    with pytest.raises(TypeError, match=r"v must have the dtype of q"):
        ops.packed_attention(**mixed, bounds=bounds)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    if device == "cuda":
        torch._dynamo.reset()
    given, _, edges = inputs(torch.float32, device)

    def block(q, k, v, kind=ops):
        bounds = ops.document_bounds(edges, q.shape[0])
        return kind.packed_attention(q * 2, k, v, bounds=bounds, window=40, softcap=5.0) + 1

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    constant = 2 * CONSTANT[torch.float32]
    assert_parity(compiled, partial(block, kind=reference), given, grad=("q", "k", "v"), constant=constant)


@pytest.mark.parametrize("options", [(0.25, None, None), (0.25, 9, 3.0)], ids=str)
def test_registered_as_a_custom_op(options, device):
    """Schema, fake implementation, autograd formula and traced graph agree with what the kernels do."""
    given, bounds, _ = inputs(torch.float32, device, lengths=[3, 0, 9])
    leaves = [given[name].detach().requires_grad_() for name in ("q", "k", "v")]
    torch.library.opcheck(torch.ops.dropforge.packed_attention.default, (*leaves, *bounds, *options))
    plain = [leaf.detach() for leaf in leaves]
    out, lse = torch.ops.dropforge.packed_attention(*plain, *bounds, *options)
    backward = torch.ops.dropforge.packed_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *plain, out, lse, *bounds, *options))


def test_documents_do_not_see_each_other(device):
    given, bounds, _ = inputs(torch.float32, device)
    from dropforge_kernels.dispatch import Backend, forced

    with forced(Backend.TRITON):
        before = ops.packed_attention(**given, bounds=bounds)
        given["k"][0] += 1
        after = ops.packed_attention(**given, bounds=bounds)
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])


@pytest.mark.gpu
def test_same_bits_at_every_run_and_in_a_graph():
    given, bounds, _ = inputs(torch.bfloat16, "cuda", width=128, lengths=[700, 3, 0, 900, 445])

    def build():
        leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}

        def call():
            out = ops.packed_attention(**leaves, bounds=bounds)
            return out, *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))

        return call

    first, second = build()(), build()()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    capture_and_replay(build)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 2, 2, 8)}, "q must have 3 dimensions"),
        ({"k": torch.zeros(4, 3, 8), "v": torch.zeros(4, 3, 8)}, "must be a multiple of those of k"),
        ({"v": torch.zeros(4, 1, 8)}, "v must have"),
        ({"window": 0}, "window must be"),
        ({"bounds": (torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))}, "starts must have"),
    ],
)
def test_bad_input(change, message):
    from dropforge_kernels.ops.packed_attention import Bounds

    good = torch.zeros(4, 2, 8)
    whole = torch.zeros(4, dtype=torch.int32)
    given = {"q": good, "k": good, "v": good, "bounds": Bounds(whole, whole + 4), **change}
    if "bounds" in change:
        given["bounds"] = Bounds(*change["bounds"])
    with pytest.raises((ValueError, TypeError), match=message):
        ops.packed_attention(**given)


@pytest.mark.parametrize(
    ("edges", "tokens", "error", "message"),
    [
        ([0, 3], 4, ValueError, "must end with the number of tokens 4; received 3"),
        ([1, 4], 4, ValueError, "must start with 0; received 1"),
        ([0, 3, 2, 4], 4, ValueError, "must not fall; received 3 then 2 at index 2"),
        ([0], 0, ValueError, r"shape \(documents \+ 1,\)"),
        (torch.tensor([0, 4]), 4, TypeError, "dtype int32; received torch.int64"),
    ],
    ids=str,
)
def test_bad_document_edges(edges, tokens, error, message):
    edges = edges if isinstance(edges, torch.Tensor) else torch.tensor(edges, dtype=torch.int32)
    with pytest.raises(error, match=message):
        ops.document_bounds(edges, tokens)
