"""AdamW over a flat buffer: against torch and the reference, 8-bit states, norm, clipping, skipped steps, capture."""

from __future__ import annotations

import pytest
import torch
from dropforge_kernels import ops, reference
from dropforge_kernels.reference.adamw import dequantize_state, dynamic_map, quantize_state
from dropforge_kernels.testing import DTYPES, random_tensor

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def sizes(device):
    return (1, 255, 1300) if device == "cpu" else (1, 255, 1300, 1_000_003, 41_943_040)


def data(size, device, dtype=torch.float32, seed=0):
    return random_tensor((size,), dtype=dtype, device=device, seed=seed)


def copied(state):
    fields = vars(state)
    return type(state)(**{k: None if v is None else v.clone() for k, v in fields.items()})


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def test_ten_steps_equal_torch(device):
    for size in sizes(device):
        param = data(size, device)
        expected = param.clone().requires_grad_()
        optimizer = torch.optim.AdamW([expected], **OPTIONS)
        state = ops.adamw_state(param)
        for step in range(10):
            grad = data(size, device, seed=step + 1)
            expected.grad = grad.clone()
            optimizer.step()
            ops.adamw(param, grad, state, **OPTIONS)
        assert state.step.tolist() == [10, 0]
        assert relative(param, expected.detach()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_dtypes_equal_the_reference(device, dtype, grad_dtype):
    ours, theirs = data(700, device, dtype), data(700, device, dtype)
    state, other = ops.adamw_state(ours), ops.adamw_state(ours)
    for step in range(3):
        grad = data(700, device, grad_dtype, seed=step + 1)
        ops.adamw(ours, grad, state, **OPTIONS)
        reference.adamw(theirs, grad, other, **OPTIONS)
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2 if device == "cpu" else 4e-3}[dtype]
    assert relative(ours, theirs) < limit
    assert relative(state.exp_avg, other.exp_avg) < 1e-6


def test_eight_bit_steps_equal_the_reference(device):
    for size in sizes(device):
        ours, theirs = data(size, device), data(size, device)
        state = ops.adamw_state(ours, bits=8)
        for step in range(5):
            grad = data(size, device, seed=step + 1) * torch.linspace(0, 2, size, device=device) ** 6
            before = copied(state)
            theirs.copy_(ours)
            ops.adamw(ours, grad, state, **OPTIONS)
            reference.adamw(theirs, grad, before, **OPTIONS)
            assert relative(ours, theirs) < 1e-6
            torch.testing.assert_close(state.absmax, before.absmax, rtol=1e-5, atol=1e-37)
            torch.testing.assert_close(state.absmax_sq, before.absmax_sq, rtol=1e-5, atol=1e-37)
            for found, expected in ((state.exp_avg, before.exp_avg), (state.exp_avg_sq, before.exp_avg_sq)):
                difference = (found.int() - expected.int()).abs()
                # a value within rounding of the border between two codes may go either way
                assert int(difference.max()) <= 1
                assert float((difference > 0).float().mean()) <= 1e-3


def test_eight_bit_follows_thirty_two_bit(device):
    size = 2000
    ours, exact = data(size, device), data(size, device)
    states = ops.adamw_state(ours, bits=8), ops.adamw_state(exact)
    start = exact.clone()
    for step in range(20):
        grad = data(size, device, seed=step % 3) + 0.3
        ops.adamw(ours, grad, states[0], **OPTIONS)
        ops.adamw(exact, grad, states[1], **OPTIONS)
    assert float((ours - exact).norm() / (exact - start).norm()) < 0.03


def test_codes_are_the_nearest_ones_everywhere(device):
    """Every border between codes, from both sides, through the kernel: a gradient that makes m (v) any value wanted."""
    for signed in (True, False):
        code = dynamic_map(signed=signed)
        assert code.numel() == 256 and bool((code.diff() > 0).all())
        middles = (code[1:] + code[:-1]) / 2
        wanted = torch.cat([code, middles * (1 - 1e-5), middles * (1 + 1e-5)])
        wanted = wanted if signed else wanted.clamp_min(0)
        padded = torch.cat([wanted, wanted.new_zeros(-wanted.numel() % 255)]).view(-1, 255)
        values = torch.nn.functional.pad(padded, (0, 1), value=1.0).reshape(-1).to(device)  # absmax 1 in each block
        param = torch.zeros_like(values)
        state = ops.adamw_state(param, bits=8)
        grad = values if signed else values.sqrt()
        ops.adamw(param, grad, state, lr=0.0, betas=(0.0, 0.0))
        found = state.exp_avg if signed else state.exp_avg_sq
        expected, _ = quantize_state(values, signed=signed)
        wrong = (found != expected).sum()
        assert int(wrong) <= (0 if signed else 8), wrong  # the square of a square root may cross a border


def test_every_code_decodes_to_its_value(device):
    """A step with betas of nearly 1 and no gradient leaves the first moment, which then moves the parameter."""
    code = dynamic_map(signed=True).to(device)
    param = torch.zeros(256, device=device)
    state = ops.adamw_state(param, bits=8)
    state.exp_avg.copy_(torch.arange(256, device=device))
    state.absmax.fill_(1.0)
    ops.adamw(param, torch.zeros_like(param), state, lr=1.0, betas=(0.5, 0.0), eps=1.0)
    torch.testing.assert_close(param, -code, rtol=2e-6, atol=0)  # 0.5 * code over the correction 1 - 0.5
    second = dynamic_map(signed=False).to(device)
    state = ops.adamw_state(param.zero_(), bits=8)
    state.exp_avg_sq.copy_(torch.arange(256, device=device))
    state.absmax_sq.fill_(1.0)
    grad = torch.full_like(param, 1e-12)
    ops.adamw(param, grad, state, lr=1.0, betas=(0.0, 0.5), eps=1e-12)
    expected = -grad.double() / (second.double().sqrt() + 1e-12)
    torch.testing.assert_close(param[1:].double(), expected[1:], rtol=1e-5, atol=0)


def test_dynamic_map_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed=signed), functional.create_dynamic_map(signed))


def test_second_moment_above_zero_stays_above_zero(device):
    grad = torch.full((256,), 1e-6, device=device)
    grad[0] = 1.0
    param = torch.zeros(256, device=device)
    state = ops.adamw_state(param, bits=8)
    ops.adamw(param, grad, state, **OPTIONS)
    second = dequantize_state(state.exp_avg_sq, state.absmax_sq, signed=False)
    assert bool((second > 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_norm(device, dtype):
    for size in (0, *sizes(device)):
        grad = data(size, device, dtype)
        torch.testing.assert_close(ops.gradient_norm(grad), grad.double().norm().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [32, 8])
def test_clipping(device, bits):
    ours, theirs = data(500, device), data(500, device)
    grad = data(500, device, seed=1) * 10
    norm = ops.gradient_norm(grad)
    state, other = ops.adamw_state(ours, bits=bits), ops.adamw_state(theirs, bits=bits)
    ops.adamw(ours, grad, state, **OPTIONS, grad_norm=norm, max_norm=0.5)
    ops.adamw(theirs, grad * (0.5 / (norm + 1e-6)), other, **OPTIONS)
    assert relative(ours, theirs) < 1e-6
    ops.adamw(ours, grad, state, **OPTIONS, grad_norm=norm, max_norm=1e9)  # below the limit: untouched
    ops.adamw(theirs, grad, other, **OPTIONS)
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(device, bits, bad):
    param, grad = data(500, device), data(500, device, seed=1)
    state = ops.adamw_state(param, bits=bits)
    ops.adamw(param, grad, state, **OPTIONS)
    before, kept = param.clone(), copied(state)
    grad[7] = bad
    ops.adamw(param, grad, state, **OPTIONS, grad_norm=ops.gradient_norm(grad))
    assert torch.equal(param, before)
    for name, value in vars(state).items():
        assert value is None or torch.equal(value, getattr(kept, name)), name


def test_rate_as_a_tensor_and_low_precision_copy(device):
    ours, theirs = data(500, device), data(500, device)
    copy = torch.zeros(500, dtype=torch.float16, device=device)
    grad = data(500, device, seed=1)
    rate = torch.tensor(0.02, device=device)
    ops.adamw(ours, grad, ops.adamw_state(ours), lr=rate, low_precision=copy)
    ops.adamw(theirs, grad, ops.adamw_state(theirs), lr=0.02)
    assert torch.equal(ours, theirs)
    assert torch.equal(copy, ours.half())


@pytest.mark.parametrize("bits", [32, 8])
def test_everything_that_changes_is_read_on_the_device(device, bits):
    """What a captured step relies on: the same call, with only device values changed in between, follows them."""
    ours, theirs = data(500, device), data(500, device)
    state, other = ops.adamw_state(ours, bits=bits), ops.adamw_state(theirs, bits=bits)
    rate, norm, grad = torch.zeros((), device=device), torch.zeros((), device=device), data(500, device, seed=1)

    def captured():
        ops.adamw(ours, grad, state, lr=rate, grad_norm=norm, max_norm=0.5)

    for value, length in ((0.01, 0.1), (0.05, 3.0), (0.02, float("inf")), (0.03, 1.0)):
        rate.fill_(value)
        norm.fill_(length)
        captured()
        if length < float("inf"):
            ops.adamw(theirs, grad * min(1.0, 0.5 / length), other, lr=value)
    assert state.step.tolist() == [3, 0]
    assert relative(ours, theirs) < 1e-5


def test_empty(device):
    param = data(0, device)
    state = ops.adamw_state(param)
    ops.adamw(param, param.clone(), state, **OPTIONS)
    assert state.step.tolist() == [1, 0]


@pytest.mark.parametrize("bits", [32, 8])
def test_compiles_without_graph_break(device, bits):
    param, grad = data(500, device), data(500, device, seed=1)
    plain, state, other = param.clone(), ops.adamw_state(param, bits=bits), ops.adamw_state(param, bits=bits)

    def step(param, grad, state):
        ops.adamw(param, grad, state, lr=0.01, grad_norm=ops.gradient_norm(grad), max_norm=1.0)

    torch.compile(step, fullgraph=True, backend="aot_eager")(param, grad, state)
    step(plain, grad, other)
    assert torch.equal(param, plain)
    assert state.step.tolist() == [1, 0]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.gpu
def test_cuda_graph_capture(bits):
    param, grad = data(5000, "cuda"), data(5000, "cuda", seed=1)
    plain, state, other = param.clone(), ops.adamw_state(param, bits=bits), ops.adamw_state(param, bits=bits)
    rate = torch.tensor(0.01, device="cuda")

    def step(param, state):
        ops.adamw(param, grad, state, lr=rate, grad_norm=ops.gradient_norm(grad), max_norm=1.0)

    step(plain, other)
    step(param, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(param, state)
    for value in (0.01, 0.05):
        rate.fill_(value)
        graph.replay()
        step(plain, other)
    torch.cuda.synchronize()
    assert torch.equal(param, plain)
    assert state.step.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"param": torch.zeros(2, 2)}, ValueError, "param must have 1 dimensions"),
        ({"param": torch.zeros(4, dtype=torch.int32)}, TypeError, "param must have dtype"),
        ({"grad": torch.zeros(5)}, ValueError, r"grad must have the shape of param \(4,\); received \(5,\)"),
        ({"grad": torch.zeros(8)[::2]}, ValueError, "grad must be contiguous"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas must be in \[0, 1\); received"),
        ({"eps": 0.0}, ValueError, "eps must be positive; received 0.0"),
        ({"max_norm": 1.0}, ValueError, "max_norm needs grad_norm"),
        ({"grad_norm": torch.zeros(2)}, ValueError, "grad_norm must be one fp32 value"),
        ({"low_precision": torch.zeros(3)}, ValueError, "low_precision must have the shape of param"),
        ({"lr": torch.zeros(2)}, ValueError, r"lr must be a number or one value; received shape \(2,\)"),
        ({"lr": torch.zeros((), dtype=torch.int64)}, TypeError, "lr must have dtype"),
        (
            {"lr": torch.zeros((), device="meta")},
            ValueError,
            r"lr must be on the device of param \(cpu\); received meta",
        ),
    ],
)
def test_wrong_arguments_are_refused(change, error, text):
    given = {
        "param": torch.zeros(4),
        "grad": torch.zeros(4),
        "state": ops.adamw_state(torch.zeros(4)),
        "lr": 1e-3,
    } | change
    with pytest.raises(error, match=text):
        ops.adamw(**given)
    with pytest.raises(ValueError, match="bits must be 32 or 8; received 4"):
        ops.adamw_state(torch.zeros(4), bits=4)
