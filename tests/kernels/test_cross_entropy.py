"""Cross-entropy against its reference: options, sizes, layouts, in-place gradient, bad targets, compile, capture."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.ops._row_losses import RowLoss, row_gradient, row_loss
from dropforge_kernels.ops._shared_rows import shared_row_loss
from dropforge_kernels.testing import DTYPES, LAYOUTS, assert_parity, random_tensor

OPTIONS = {
    "plain": {},
    "softcap": {"logit_softcap": 5.0, "logit_scale": 0.7},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss_weight": 1e-2, "reduction": "sum"},
    "all": {"logit_softcap": 30.0, "logit_scale": 0.5, "label_smoothing": 0.2, "z_loss_weight": 1e-3},
    "none": {"reduction": "none"},
    "items": {"reduction": "sum", "num_items_in_batch": 37},
}

# In place, the gradient is stored in the logits' dtype before the upstream gradient is known, and rounded once more
# when that is not 1 (here it is random): half a step of the dtype more, which shows undiminished in tensors of a few
# elements.
ROUNDED_AGAIN = {torch.bfloat16: 2.0**-8 + 1e-3, torch.float16: 2.0**-11 + 1.25e-4, torch.float32: 1e-6}


def sizes(device):
    if device == "cpu":
        return ((0, 40), (1, 1), (5, 33), (3, 9000))
    return ((0, 40), (1, 1), (7, 33), (333, 1000), (65, 32768), (64, 128256), (33, 151936), (17, 262208), (9, 262207))


def targets(rows, vocabulary, device, *, ignored=True, dtype=torch.int64):
    found = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows)).to(dtype)
    if ignored and rows > 1:
        found[::3] = -100
    return found.to(device)


def inputs(rows, vocabulary, dtype, device, layout="contiguous", **options):
    logits = random_tensor((rows, vocabulary), dtype=dtype, device=device, layout=layout, scale=3.0)
    return {"logits": logits, "target": targets(rows, vocabulary, device)} | options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_values_and_gradients_over_the_shape_grid(device, dtype, options, inplace):
    if inplace and options.get("reduction") == "none":
        pytest.skip("per-row losses have no in-place gradient")
    for rows, vocabulary in sizes(device):
        # With one vocabulary entry lse - z is 0 and only the z-loss is left, a thousandth of the rounding's origin:
        # not a fair ratio.
        vocabulary = max(vocabulary, 3) if "z_loss_weight" in options else vocabulary
        given = inputs(rows, vocabulary, dtype, device, inplace_gradient=inplace, **options)
        constant = ROUNDED_AGAIN[dtype] if inplace and device == "cuda" else None
        assert_parity(ops.cross_entropy, reference.cross_entropy, given, grad=("logits",), constant=constant)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts(device, layout, inplace):
    given = inputs(6, 70, torch.float32, device, layout, inplace_gradient=inplace)
    assert_parity(ops.cross_entropy, reference.cross_entropy, given, grad=("logits",))


def test_leading_dimensions_and_int32_targets(device):
    logits = random_tensor((2, 3, 50), dtype=torch.float32, device=device)
    target = targets(6, 50, device, dtype=torch.int32).view(2, 3)
    for reduction in ("mean", "none"):
        given = {"logits": logits, "target": target, "reduction": reduction}
        assert_parity(ops.cross_entropy, reference.cross_entropy, given, grad=("logits",))


def test_equals_torch(device):
    given = inputs(9, 130, torch.float32, device)
    expected = torch.nn.functional.cross_entropy(given["logits"], given["target"], label_smoothing=0.1)
    torch.testing.assert_close(ops.cross_entropy(**given, label_smoothing=0.1), expected)


def test_masked_vocabulary_entries(device):
    given = inputs(5, 64, torch.float32, device)
    given["logits"][:, 60:] = -float("inf")
    given["target"] = given["target"].clamp(max=59)
    given["target"][0] = -100
    assert_parity(ops.cross_entropy, reference.cross_entropy, given, grad=("logits",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "rule",
    [RowLoss(), RowLoss(logit_scale=40.0), RowLoss(-100, 2.0, 3.0, 0.1, 0.01), RowLoss(label_smoothing=0.2)],
    ids=["plain", "scale", "all", "smoothing"],
)
def test_rows_shared_by_programs_equal_rows_of_one(device, dtype, rule):
    """Loss, log-sum-exp, entropy and gradient in place. One part a row in the interpreter, several on a GPU."""
    rows, vocabulary = (6, 500) if device == "cpu" else (300, 20011)
    logits = random_tensor((rows, vocabulary), dtype=dtype, device=device)
    logits[:, 7:20] = -float("inf") if rule.logit_softcap == 0 and rule.label_smoothing == 0 else 0.0
    target = targets(rows, vocabulary, device)
    target[0], target[1], target[2] = 3, -100, vocabulary
    results = []
    for shared in (False, True):
        own = logits.clone()
        nll, lse, entropy = (torch.empty(rows, device=device) for _ in range(3))
        if shared:
            part = 512 if device == "cpu" else 4096
            shared_row_loss(
                own, target, rule, nll=nll, lse=lse, entropy=entropy, upstream=None, part=part, warps=4, groups=(1, 1)
            )
        else:
            row_loss(own, target, rule, nll=nll, lse=lse, entropy=entropy)
            one = torch.ones(1, device=device)
            row_gradient(own, target, rule, lse=lse, upstream=one, out=own)
        results.append((nll, lse, entropy, own))
    for plain, shared in zip(*results, strict=True):
        limit = 2e-3 if shared.dtype is torch.float16 else 2e-5
        # The entropy is a small difference of two numbers as large as lse: some rounding steps of those.
        rounding = 1e-6 * float(results[0][1].nan_to_num().abs().max())
        torch.testing.assert_close(shared, plain, equal_nan=True, rtol=limit, atol=limit + rounding)


def test_nothing_counted_gives_zero_loss_and_zero_gradient(device):
    logits = random_tensor((4, 50), dtype=torch.float32, device=device).requires_grad_()
    loss = ops.cross_entropy(logits, torch.full((4,), -100, device=device))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_target_outside_the_vocabulary_is_nan_on_the_device_and_an_error_in_the_reference(device):
    logits = random_tensor((3, 50), dtype=torch.float32, device=device).requires_grad_()
    for bad in (50, -1):
        target = torch.tensor([1, bad, 2], device=device)
        loss = ops.cross_entropy(logits, target)
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient[1].isnan().all()
        with pytest.raises(IndexError, match="outside"):
            reference.cross_entropy(logits, target)


def test_inplace_gradient_replaces_the_logits_and_refuses_a_second_backward(device):
    logits = random_tensor((4, 50), dtype=torch.float32, device=device)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0
    loss = ops.cross_entropy(hidden, torch.tensor([1, 2, -100, 3], device=device), inplace_gradient=True)
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_inplace_gradient_tells_whoever_saved_the_logits(device):
    leaf = random_tensor((4, 50), dtype=torch.float32, device=device).requires_grad_()
    logits = leaf * 1.0
    squares = logits * logits
    loss = ops.cross_entropy(logits, torch.tensor([1, 2, 0, 3], device=device), inplace_gradient=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares.sum()).backward()


def test_number_of_items_as_a_tensor(device):
    given = inputs(5, 40, torch.float32, device)
    by_number = ops.cross_entropy(**given, num_items_in_batch=11)
    by_tensor = ops.cross_entropy(**given, num_items_in_batch=torch.tensor(11, device=device))
    assert torch.equal(by_number, by_tensor)
    assert ops.cross_entropy(**given, num_items_in_batch=0).isfinite()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_break(device, backend):
    if device == "cuda":
        torch._dynamo.reset()

    def step(logits, target, kind=ops):
        return kind.cross_entropy(logits * 2, target, logit_softcap=10.0, inplace_gradient=True) * 3

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    given = inputs(6, 70, torch.float32, device)
    assert_parity(compiled, partial(step, kind=reference), given, grad=("logits",))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.gpu
def test_cuda_graph_capture(inplace):
    given = inputs(64, 4096, torch.bfloat16, "cuda")
    leaf = given["logits"].requires_grad_()

    def step():
        loss = ops.cross_entropy(leaf * 1.0, given["target"], inplace_gradient=inplace)
        return loss, *torch.autograd.grad(loss, leaf)

    expected = [t.detach().clone() for t in step()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    rows, vocabulary = 16800, 128256  # 2.15e9 elements
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-1] = random_tensor((vocabulary,), dtype=torch.bfloat16, device="cuda")
    target = torch.full((rows,), -100, device="cuda")
    target[-1] = 5
    expected = reference.cross_entropy(logits[-1:].clone(), target[-1:])
    for inplace in (False, True):
        leaf = logits.detach().requires_grad_()
        loss = ops.cross_entropy(leaf, target, inplace_gradient=inplace)
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(loss, expected)
        assert not gradient[:-1].any()
        assert gradient[-1].any()
        del gradient, leaf, loss


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have shape \(4\); received \(3,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target must have dtype int32, int64; received float32"),
        ({"logits": torch.ones(4, 9, dtype=torch.float64)}, TypeError, "logits must have dtype .* received float64"),
        ({"logits": torch.ones(4, 0)}, ValueError, r"V at least 1; received \(4, 0\)"),
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor; received list"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "device"),
        ({"reduction": "max"}, ValueError, "reduction must be one of .* received 'max'"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\); received 1.0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive; received 0.0"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap must be positive"),
        ({"z_loss_weight": -1.0}, ValueError, "z_loss_weight must not be negative"),
        ({"reduction": "none", "num_items_in_batch": 3}, ValueError, "num_items_in_batch needs reduction"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = {"logits": torch.ones(4, 9), "target": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=text):
        ops.cross_entropy(**given)
