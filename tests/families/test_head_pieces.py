"""cuDNN's backward on some heads at a time, with torch's own attention in cuDNN's place: every head gets its gradient."""

from __future__ import annotations

import pytest
import torch

HEADS, GROUPS, WIDTH, TOKENS = 8, 4, 16, 24


def attention(q, k, v, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@pytest.fixture
def calls(monkeypatch):
    """Query heads of each call of the stand-in."""
    from dropforge_kernels.modules import joint_attention

    seen = []

    def backward(dout, q, k, v, out, lse, *arguments, scale):
        assert lse.shape == (*q.shape[:3], 1) and out.shape == q.shape
        seen.append(q.shape[1])
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            made = attention(*leaves, scale)
        torch.testing.assert_close(made, out)
        return torch.autograd.grad(made, leaves, dout)

    monkeypatch.setattr(joint_attention, "_CUDNN_BACKWARD", backward)
    return seen


@pytest.mark.parametrize(("rows", "least", "pieces"), [(1, 2, 4), (1, 4, 2), (1, 8, 1), (2, 2, 1)])
def test_every_head_gets_its_gradient(rows, least, pieces, calls, monkeypatch):
    from dropforge_kernels.modules import head_pieces
    from dropforge_kernels.modules.joint_attention import Attended, attend_backward
    from dropforge_kernels.modules.layer import AttentionShape, Frame

    monkeypatch.setattr(head_pieces, "SPLIT_FROM", TOKENS)
    monkeypatch.setattr(head_pieces, "LEAST_HEADS", least)
    torch.manual_seed(0)
    shape = AttentionShape(heads=HEADS, groups=GROUPS, width=WIDTH, scale=0.3)
    still = (torch.ones(rows * TOKENS, WIDTH // 2), torch.zeros(rows * TOKENS, WIDTH // 2))  # no rotation
    frame = Frame(tables={"": still}, rows=rows)
    qkv = torch.randn(rows * TOKENS, (HEADS + 2 * GROUPS) * WIDTH)
    dout = torch.randn(rows * TOKENS, HEADS * WIDTH)

    leaf = qkv.clone().requires_grad_()
    parts = leaf.view(rows, TOKENS, HEADS + 2 * GROUPS, WIDTH).transpose(1, 2).split((HEADS, GROUPS, GROUPS), 1)
    out = attention(*parts, shape.scale).transpose(1, 2).reshape(rows * TOKENS, -1)
    (want,) = torch.autograd.grad(out, leaf, dout)
    state = Attended(qkv, out.detach(), torch.zeros(rows, HEADS, TOKENS, 1))
    got = attend_backward(shape, dout, state, frame)
    assert calls == [HEADS // pieces] * pieces
    torch.testing.assert_close(got, want)


def test_the_planner_knows_how_wide_cudnns_heads_may_be():
    from dropforge_kernels.modules.joint_attention import CUDNN_WIDTH
    from dropforge_kernels.modules.model_shape import WIDEST_SPLIT

    assert WIDEST_SPLIT == CUDNN_WIDTH
