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


def run(given, bounds, options):
    assert_parity(
        partial(ops.packed_attention, bounds=bounds, **options),
        partial(reference.packed_attention, bounds=bounds, **options),
        given,
        grad=("q", "k", "v"),
        constant=2 * CONSTANT[given["q"].dtype],
    )


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
