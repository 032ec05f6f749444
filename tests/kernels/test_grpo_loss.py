"""The GRPO family against its reference: every loss, both levels, clipping, KL, masks, and on top of
linear_logprobs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.testing import DTYPES, assert_parity, random_tensor

LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 40},
    "dapo": {"loss_type": "dapo", "num_items_in_batch": 53},
    "dapo of this batch": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2, "num_items_in_batch": 53},
    "cispo of sequences": {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 2.0},
    "vespo": {"loss_type": "vespo", "num_items_in_batch": 53, "vespo_k_pos": 1.5, "vespo_lambda_neg": 2.5},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
}
VARIANTS = {
    "plain": {"old": False},
    "clipped": {"epsilon": 0.1, "epsilon_high": 0.3},
    "two-sided": {"epsilon": 0.2, "delta": 1.5},
    "kl": {"beta": 0.05},
    "all": {"epsilon": 0.1, "epsilon_high": 0.2, "delta": 2.0, "beta": 0.1},
}


def inputs(shape, dtype, device, *, old=True, beta=0.0, **options):
    mask = random_tensor(shape, dtype=torch.float32, device=device, seed=5) > -0.7
    if shape[0] > 2:
        mask[1] = False
    given = {
        "logprobs": -random_tensor(shape, dtype=dtype, device=device).abs(),
        "advantages": random_tensor(shape[:1], dtype=torch.float32, device=device, seed=1),
        "mask": mask,
        "beta": beta,
    }
    if old:
        given["old_logprobs"] = given["logprobs"] + random_tensor(shape, dtype=dtype, device=device, seed=2, scale=0.3)
    if beta:
        given["ref_logprobs"] = given["logprobs"] + random_tensor(shape, dtype=dtype, device=device, seed=3, scale=0.5)
    return given | options


def sizes(device):
    return ((5, 23), (1, 1), (3, 1100)) if device == "cpu" else ((5, 23), (1, 1), (64, 1024), (33, 4097), (7, 20000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_values_and_gradients(device, dtype, loss, variant):
    if loss["loss_type"] in (
        "cispo",
        "sapo",
        "vespo",
    ):  # delta belongs to the clipped surrogate, epsilon_high means another thing
        variant = {name: value for name, value in variant.items() if name not in ("delta", "epsilon_high")}
    shapes = sizes(device)
    for shape in shapes[:2] if device == "cpu" and dtype is not torch.float32 else shapes:
        given = inputs(shape, dtype, device, **(loss | variant))
        assert_parity(ops.grpo_loss, reference.grpo_loss, given, grad=("logprobs",))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_masked_values_do_not_matter(device, mask_dtype):
    given = inputs((5, 23), torch.float32, device, beta=0.1)
    expected = ops.grpo_loss(**given)
    hidden = ~given["mask"]
    for name, value in (("logprobs", float("nan")), ("old_logprobs", -1e30), ("ref_logprobs", float("inf"))):
        given[name] = given[name].masked_fill(hidden, value)
    given["mask"] = given["mask"].to(mask_dtype)
    leaf = given["logprobs"].requires_grad_()
    found = ops.grpo_loss(**given)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.detach(), b.detach())
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    assert not gradient[hidden].any()
    assert gradient.isfinite().all()


def test_nan_at_a_token_that_counts_reaches_the_loss(device):
    given = inputs((5, 23), torch.float32, device)
    given["mask"][0, 0] = True
    given["logprobs"][0, 0] = float("nan")
    assert ops.grpo_loss(**given).loss.isnan()


def test_huge_ratios_stay_finite(device):
    given = inputs((2, 8), torch.float32, device, beta=0.1)
    given["old_logprobs"] -= 500
    given["ref_logprobs"] += 500
    assert_parity(ops.grpo_loss, reference.grpo_loss, given, grad=("logprobs",))
    assert ops.grpo_loss(**given).loss.isfinite()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 4)])
def test_nothing_to_learn_from(device, loss, shape):
    given = inputs(shape, torch.float32, device, **loss)
    given["mask"][:] = False
    leaf = given["logprobs"].requires_grad_()
    found = ops.grpo_loss(**given)
    assert found.loss.item() == 0.0
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    assert not gradient.any()


def test_cispo_weights_the_policy_gradient_and_sapo_starts_from_it(device):
    """CISPO: every token's gradient is -min(ratio, bound) a, clipped or not. SAPO: at ratio 1 the slope is -a."""
    given = inputs((4, 9), torch.float32, device, loss_type="cispo", epsilon_high=1.1, num_items_in_batch=1)
    leaf = given["logprobs"].requires_grad_()
    found = ops.grpo_loss(**given)
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    ratio = (leaf - given["old_logprobs"]).detach().exp()
    assert bool((ratio > 1.1).any() & (ratio < 1.1).any())
    expected = -ratio.clamp(max=1.1) * given["advantages"][:, None] * given["mask"]
    torch.testing.assert_close(gradient, expected)
    soft = inputs((4, 9), torch.float32, device, old=False, loss_type="sapo", sapo_temperature_neg=3.0)
    leaf = soft["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.grpo_loss(**soft).loss, leaf)
    counted = soft["mask"].sum(1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(gradient, -soft["advantages"][:, None] * soft["mask"] / counted / 4)


def test_vespo_weights_a_sequence_by_its_importance(device):
    """At weight 1 the policy gradient itself; elsewhere every token of a sequence is scaled by w^k e^(lambda (1 - w))."""
    given = inputs((4, 9), torch.float32, device, loss_type="vespo", num_items_in_batch=1)
    given["old_logprobs"] = given["logprobs"] + 0.1 * (given["old_logprobs"] - given["logprobs"])
    leaf = given["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.grpo_loss(**given).loss, leaf)
    moved = (leaf - given["old_logprobs"]).detach() * given["mask"]
    weight = moved.sum(1, keepdim=True).exp()
    advantage = given["advantages"][:, None]
    positive = weight**2 * (3 * (1 - weight)).exp()
    negative = weight**3 * (2 * (1 - weight)).exp()
    expected = -torch.where(advantage >= 0, positive, negative) * advantage * given["mask"]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert bool((weight - 1).abs().max() > 0.01)
    still = given | {"old_logprobs": None}
    (gradient,) = torch.autograd.grad(ops.grpo_loss(**still).loss, leaf)
    torch.testing.assert_close(gradient, -advantage * given["mask"])


def test_on_policy_gradient_is_that_of_the_policy_gradient(device):
    given = inputs((4, 9), torch.float32, device, old=False, loss_type="bnpo")
    leaf = given["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.grpo_loss(**given).loss, leaf)
    mask = given["mask"].float()
    torch.testing.assert_close(gradient, -given["advantages"][:, None] * mask / mask.sum())


def test_clipped_shares(device):
    given = {
        "logprobs": torch.tensor([[0.0, 0.0, 0.0, 0.0]], device=device),
        "old_logprobs": torch.tensor([[1.0, -1.0, 0.0, -1.0]], device=device),
        "mask": torch.tensor([[1, 1, 1, 0]], device=device),
    }
    up = ops.grpo_loss(advantages=torch.tensor([1.0], device=device), **given)
    down = ops.grpo_loss(advantages=torch.tensor([-1.0], device=device), **given)
    torch.testing.assert_close(torch.stack([up.clipped_low, up.clipped_high]).cpu(), torch.tensor([0.0, 1 / 3]))
    torch.testing.assert_close(torch.stack([down.clipped_low, down.clipped_high]).cpu(), torch.tensor([1 / 3, 0.0]))


def test_on_top_of_linear_logprobs(device):
    """From hidden states to the loss and back, completion tokens only."""
    target = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0)).to(device)
    target[:, :5] = -100
    mask = target != -100
    old = -random_tensor((4, 12), dtype=torch.float32, device=device, seed=4).abs() - 3
    advantages = random_tensor((4,), dtype=torch.float32, device=device, seed=6)
    weight = random_tensor((50, 16), dtype=torch.float32, device=device, seed=1)

    def step(hidden, weight, kind=ops):
        logprobs = kind.linear_logprobs(hidden, weight, target, logit_scale=0.5).logprobs
        return kind.grpo_loss(logprobs, advantages, mask, old_logprobs=old, loss_type="grpo").loss

    hidden = random_tensor((4, 12, 16), dtype=torch.float32, device=device)
    assert_parity(step, partial(step, kind=reference), {"hidden": hidden, "weight": weight}, grad=("hidden",))


def test_compiles_without_graph_break(device):
    given = inputs((5, 23), torch.float32, device, beta=0.1)
    compiled = torch.compile(ops.grpo_loss, fullgraph=True, backend="aot_eager")
    assert_parity(compiled, reference.grpo_loss, given, grad=("logprobs",))


@pytest.mark.gpu
def test_cuda_graph_capture():
    given = inputs((8, 100), torch.float32, "cuda", beta=0.1)
    leaf = given["logprobs"].requires_grad_()

    def step():
        loss = ops.grpo_loss(**given).loss
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


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logprobs": torch.zeros(12)}, ValueError, "logprobs must have 2 dimensions"),
        ({"advantages": torch.zeros(4)}, ValueError, r"advantages must have shape \(3\); received \(4,\)"),
        ({"mask": torch.ones(3, 5)}, ValueError, "mask must have the shape of logprobs"),
        ({"old_logprobs": torch.zeros(3, 5)}, ValueError, "old_logprobs must have the shape of logprobs"),
        ({"loss_type": "ppo"}, ValueError, "loss_type must be one of .* received 'ppo'"),
        ({"importance_sampling_level": "batch"}, ValueError, "importance_sampling_level must be one of"),
        ({"epsilon": -0.1}, ValueError, r"epsilon must be in \[0, 1\]"),
        ({"delta": 1.1}, ValueError, "delta must be above 1"),
        ({"beta": 0.1}, ValueError, "beta above 0 needs ref_logprobs; received None"),
        ({"beta": -0.1}, ValueError, "beta must not be negative"),
        ({"loss_type": "dr_grpo"}, ValueError, "needs max_completion_length; received None"),
        ({"loss_type": "cispo"}, ValueError, "needs epsilon_high, the greatest weight; received None"),
        ({"vespo_k_neg": 0.0}, ValueError, "vespo's k and lambda must be positive; received 2.0, 0.0"),
        ({"loss_type": "sapo", "delta": 2.0}, ValueError, "delta belongs to the clipped surrogate, not to 'sapo'"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, ValueError, "temperatures must be positive; received 0.0"),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = {"logprobs": torch.zeros(3, 4), "advantages": torch.zeros(3), "mask": torch.ones(3, 4)} | change
    with pytest.raises(error, match=text):
        ops.grpo_loss(**given)
