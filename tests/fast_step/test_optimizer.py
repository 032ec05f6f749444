"""FlatAdamW is torch's AdamW (and bitsandbytes' 8-bit one) over flat buffers (CPU)."""

from __future__ import annotations

import pytest
import torch
from dropforge.fast_step.flat import ALIGNMENT, FlatParameters
from dropforge.fast_step.optimizer import FlatAdamW
from torch import nn

SHAPES = [(7, 5), (64, 80), (3,), (128, 64)]


def parameters():
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def fill(params, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        grad = torch.randn(parameter.shape, generator=generator)
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad.copy_(grad)


def test_equals_torchs_adamw_with_groups_clipping_and_a_schedule():
    ours, theirs = parameters(), parameters()
    groups = lambda p: [{"params": p[:2], "weight_decay": 0.1}, {"params": p[2:], "weight_decay": 0.0, "lr": 3e-4}]  # noqa: E731
    flat = FlatAdamW(groups(ours), lr=1e-2, max_grad_norm=2.0)
    plain = torch.optim.AdamW(groups(theirs), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)) for o in (flat, plain)]
    for step in range(6):
        fill(ours, step)
        fill(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs, 2.0)
        flat.step()
        plain.step()
        for schedule in schedules:
            schedule.step()
        assert float(flat.last_norm) == pytest.approx(float(norm), rel=1e-5)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_skips_the_step():
    params = parameters()
    flat = FlatAdamW(params, lr=1e-2)
    fill(params, 0)
    flat.step()
    before = [p.detach().clone() for p in params]
    params[1].grad[0, 0] = float("nan")
    flat.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not torch.isfinite(flat.last_norm)


@pytest.mark.parametrize("bits", [32, 8])
def test_saved_and_loaded_goes_on_to_the_last_bit(bits, tmp_path):
    whole = parameters()
    optimizer = FlatAdamW(whole, lr=1e-2, bits=bits)
    for step in range(4):
        fill(whole, step)
        optimizer.step()
        if step == 1:
            torch.save({"optimizer": optimizer.state_dict(), "values": [p.detach().clone() for p in whole]},
                       tmp_path / "state.pt")  # fmt: skip
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = parameters()
    other = FlatAdamW(resumed, lr=5.0, bits=bits)
    with torch.no_grad():
        for parameter, value in zip(resumed, saved["values"], strict=True):
            parameter.copy_(value)
    other.load_state_dict(saved["optimizer"])
    for step in range(2, 4):
        fill(resumed, step)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_states_of_others_are_refused():
    flat = FlatAdamW(parameters(), lr=1e-2)
    plain = torch.optim.AdamW(parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="another optimizer"):
        flat.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="other bits"):
        flat.load_state_dict(FlatAdamW(parameters(), lr=1e-2, bits=8).state_dict())
    with pytest.raises(ValueError, match="saved"):
        flat.load_state_dict(FlatAdamW([nn.Parameter(torch.zeros(9000))], lr=1e-2).state_dict())


def test_small_parameters_and_embeddings_keep_32_bits():
    params = parameters()
    flat = FlatAdamW(params, lr=1e-2, bits=8, keep_32_bit=[params[3]])
    assert sorted(zip(flat._bits, (len(s.parameters) for s in flat.flat.segments), strict=True)) == [(8, 1), (32, 3)]
    assert flat.state_bytes() < 8 * sum(segment.values.numel() for segment in flat.flat.segments)


def test_flat_views_are_the_parameters():
    params = parameters()
    before = [p.detach().clone() for p in params]
    tied = params[0]
    flat = FlatParameters([params[:2], params[2:]])
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert all(start % ALIGNMENT == 0 for segment in flat.segments for start in segment.starts)
    (tied * 2).sum().backward()
    assert torch.equal(flat.segments[0].grads[: tied.numel()].view_as(tied), torch.full_like(tied, 2.0))
    flat.zero_grad()
    assert not tied.grad.any()
    tied.grad = torch.ones_like(tied)  # somebody replaces it
    flat.attach_grads()
    assert torch.equal(flat.segments[0].grads[: tied.numel()].view_as(tied), torch.ones_like(tied))
    flat.segments[0].values.zero_()
    assert not tied.any()


def test_parameters_of_two_dtypes_make_two_segments_and_one_norm():
    params = [nn.Parameter(torch.randn(300)), nn.Parameter(torch.randn(300).bfloat16())]
    flat = FlatAdamW(params, lr=1e-2)
    params[0].grad.fill_(3.0)
    params[1].grad.fill_(4.0)
    flat.step()
    assert float(flat.last_norm) == pytest.approx(5 * 300**0.5, rel=1e-4)
    with pytest.raises(ValueError, match="one dtype"):
        FlatParameters([params])
