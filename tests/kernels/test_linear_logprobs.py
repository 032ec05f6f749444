"""Log-probabilities and entropy from hidden states against the reference: both ways to the gradient, chunks, masks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, INTERPRETER_BF16, assert_parity, random_tensor

OPTIONS = {
    "plain": {},
    "softcap": {"logit_softcap": 5.0, "logit_scale": 1 / 0.7},
    "entropy": {"return_entropy": True, "logit_softcap": 9.0},
    "all rows": {"skip_ignored": False, "return_entropy": True},
    "bound": {"max_valid": 33, "return_entropy": True},
}


def inputs(dtype, device, *, rows=40, width=24, vocabulary=77, **options):
    target = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))
    target[::3] = -100
    hidden = random_tensor((rows, width), dtype=dtype, device=device)
    weight = random_tensor((vocabulary, width), dtype=dtype, device=device, seed=1, scale=0.5)
    return {"hidden": hidden, "weight": weight, "target": target.to(device), "memory_budget": 1} | options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("grad", [("hidden",), ("hidden", "weight"), ("weight",)], ids="+".join)
@pytest.mark.parametrize("entropy_gradient", [False, True], ids=["", "entropy gradient"])
def test_values_and_gradients(device, dtype, options, grad, entropy_gradient):
    if device == "cpu" and dtype is not torch.float32 and grad != ("hidden", "weight"):
        pytest.skip("the GPU runs the whole grid; the interpreter needs a second for each")
    if entropy_gradient and not options.get("return_entropy"):
        pytest.skip("no entropy to differentiate")
    given = inputs(dtype, device, entropy_gradient=entropy_gradient, **options)
    constant = INTERPRETER_BF16 if device == "cpu" and dtype is torch.bfloat16 else None
    assert_parity(ops.linear_logprobs, reference.linear_logprobs, given, grad=grad, constant=constant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.gpu
def test_sizes_of_real_models(dtype, entropy_gradient):
    for rows, width, vocabulary in ((1500, 1024, 151936), (777, 2560, 262208)):
        given = inputs(dtype, "cuda", rows=rows, width=width, vocabulary=vocabulary, memory_budget=256 << 20)
        given["weight"] *= 0.04
        given |= {"return_entropy": True, "entropy_gradient": entropy_gradient}
        assert_parity(ops.linear_logprobs, reference.linear_logprobs, given, grad=("hidden",))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_rows_and_leading_dimensions(device, rows):
    given = inputs(torch.float32, device, rows=rows, return_entropy=True)
    given["hidden"], given["target"] = given["hidden"].view(1, rows, 24), given["target"].view(1, rows)
    assert_parity(ops.linear_logprobs, reference.linear_logprobs, given, grad=("hidden",))


def test_equals_log_softmax(device):
    given = inputs(torch.float32, device)
    live = given["target"] != -100
    found = ops.linear_logprobs(**given, return_entropy=True)
    truth = torch.distributions.Categorical(logits=given["hidden"] @ given["weight"].t())
    torch.testing.assert_close(found.logprobs[live], truth.log_prob(given["target"].clamp_min(0))[live])
    torch.testing.assert_close(found.entropy[live], truth.entropy()[live])
    assert not found.logprobs[~live].any()
    assert not found.entropy[~live].any()


def test_upstream_of_one_value_for_all_rows(device):
    given = inputs(torch.float32, device)
    leaf = given["hidden"].requires_grad_()
    (ours,) = torch.autograd.grad(ops.linear_logprobs(**given).logprobs.sum(), leaf)
    (truth,) = torch.autograd.grad(reference.linear_logprobs(**given).logprobs.sum(), leaf)
    torch.testing.assert_close(ours, truth)


def test_entropy_is_detached_unless_asked(device):
    given = inputs(torch.float32, device, return_entropy=True)
    given["hidden"].requires_grad_()
    assert not ops.linear_logprobs(**given).entropy.requires_grad
    assert ops.linear_logprobs(**given, entropy_gradient=True).entropy.requires_grad


def test_bound_below_the_counted_rows_is_nan(device):
    assert ops.linear_logprobs(**inputs(torch.float32, device, max_valid=25)).logprobs.isnan().all()
    assert ops.linear_logprobs(**inputs(torch.float32, device, max_valid=26)).logprobs.isfinite().all()


def test_autocast(device):
    given = inputs(torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = ops.linear_logprobs(**given).logprobs
    narrow = {k: v.bfloat16() if k in ("hidden", "weight") else v for k, v in given.items()}
    assert torch.equal(found, ops.linear_logprobs(**narrow).logprobs)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_compiles_without_graph_break(device, entropy_gradient):
    def step(hidden, weight, target, memory_budget, kind=ops):
        found = kind.linear_logprobs(
            hidden * 2,
            weight,
            target,
            memory_budget=memory_budget,
            return_entropy=True,
            entropy_gradient=entropy_gradient,
        )
        return found.logprobs * 3, found.entropy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = inputs(torch.float32, device)
    assert_parity(compiled, partial(step, kind=reference), given, grad=("hidden",))


@pytest.mark.gpu
def test_cuda_graph_capture():
    given = inputs(torch.bfloat16, "cuda", width=64, vocabulary=512, max_valid=30, return_entropy=True)
    leaf = given["hidden"].requires_grad_()

    def step():
        found = ops.linear_logprobs(**given)
        return found.logprobs, found.entropy, *torch.autograd.grad(found.logprobs.square().sum(), leaf)

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
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.ones(7, 5)}, ValueError, r"linear_logprobs: weight must have shape \(V, 8\)"),
        ({"target": torch.zeros(4)}, TypeError, "target must have dtype int32, int64; received float32"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be positive; received -1.0"),
        ({"max_valid": -1}, ValueError, "max_valid must not be negative; received -1"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = {"hidden": torch.ones(4, 8), "weight": torch.ones(7, 8), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=text):
        ops.linear_logprobs(**(given | change))
