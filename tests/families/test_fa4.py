"""FlashAttention 4 in a layer, with torch's own attention in its place: who is asked, with what, and who is believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

HEADS, GROUPS, WIDTH = 8, 2, 16


def dense(t, rows):
    return t.unflatten(0, (rows, -1)).transpose(1, 2)


def attention(q, k, v, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


class StandIn:
    """The package's two functions. wrong: added to dk."""

    def __init__(self, wrong=0.0, error=None):
        self.wrong, self.error, self.calls = wrong, error, []

    def forward(
        self, q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse
    ):
        if self.error:
            raise self.error
        assert causal and return_lse and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype is torch.int32
        assert cu_seqlens_q.diff().unique().tolist() == [max_seqlen_q] == [max_seqlen_k]
        rows = cu_seqlens_q.numel() - 1
        self.calls.append(("forward", q.shape[1], rows))
        out = attention(*(dense(t, rows) for t in (q, k, v)), softmax_scale).transpose(1, 2).flatten(0, 1).contiguous()
        return out, torch.zeros(q.shape[1], q.shape[0]), None, None, None

    def backward(
        self, q, k, v, out, dout, lse, scale, causal, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    ):
        rows = cu_seqlens_q.numel() - 1
        assert lse.shape == (q.shape[1], q.shape[0]) and causal
        self.calls.append(("backward", q.shape[1], rows))
        leaves = [dense(t, rows).detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            made = attention(*leaves, scale)
        dq, dk, dv = (t.transpose(1, 2).flatten(0, 1) for t in torch.autograd.grad(made, leaves, dense(dout, rows)))
        return dq, dk + self.wrong, dv


@pytest.fixture
def installed(monkeypatch):
    """installed(stand_in) puts it in the package's place."""
    from dropforge_kernels.modules import fa4

    def put(stand_in):
        monkeypatch.setattr(fa4, "_VERDICTS", fa4._Verdicts())
        monkeypatch.setattr(fa4, "fa4_missing", lambda: None)
        monkeypatch.setattr(fa4, "ROWS_FROM", 24)
        monkeypatch.setattr(fa4, "_functions", lambda: (stand_in.forward, stand_in.backward))
        return stand_in

    return put


def run(rows, length, monkeypatch):
    """dqkv of a layer's attention, and what autograd says it should be."""
    from dropforge_kernels.modules import joint_attention
    from dropforge_kernels.modules.layer import AttentionShape, Frame

    monkeypatch.setattr(joint_attention, "way", lambda shape, frame, x: "dense")
    torch.manual_seed(0)
    tokens = rows * length
    shape = AttentionShape(heads=HEADS, groups=GROUPS, width=WIDTH, scale=0.3)
    frame = Frame(tables={"": (torch.ones(tokens, WIDTH // 2), torch.zeros(tokens, WIDTH // 2))}, rows=rows)
    qkv, dout = torch.randn(tokens, (HEADS + 2 * GROUPS) * WIDTH), torch.randn(tokens, HEADS * WIDTH)
    leaf = qkv.clone().requires_grad_()
    parts = leaf.view(rows, length, HEADS + 2 * GROUPS, WIDTH).transpose(1, 2).split((HEADS, GROUPS, GROUPS), 1)
    out = attention(*parts, shape.scale).transpose(1, 2).reshape(tokens, -1)
    (want,) = torch.autograd.grad(out, leaf, dout)
    state = joint_attention.attend(shape, qkv, frame)
    torch.testing.assert_close(state.out, out.detach())
    again = joint_attention.attend_again(shape, qkv, frame, state.out, state.lse)
    return joint_attention.attend_backward(shape, dout, replace(again), frame), want


@pytest.mark.parametrize(("rows", "length", "pieces"), [(2, 24, 1), (1, 48, 2), (3, 30, 1)])
def test_long_rows_go_to_it_both_ways(rows, length, pieces, installed, monkeypatch):
    from dropforge_kernels.modules import head_pieces

    monkeypatch.setattr(head_pieces, "SPLIT_FROM", 48)
    monkeypatch.setattr(head_pieces, "LEAST_HEADS", 4)
    used = installed(StandIn())
    got, want = run(rows, length, monkeypatch)
    torch.testing.assert_close(got, want)
    trial = [("forward", 8, 2), ("backward", 8, 2)]
    assert used.calls == [*trial, ("forward", 8, rows), *[("backward", 8 // pieces, rows)] * pieces]


@pytest.mark.parametrize(
    ("stand_in", "words"),
    [(StandIn(wrong=0.5), "dk is"), (StandIn(error=RuntimeError("no such architecture")), "no such architecture")],
)
def test_what_differs_or_fails_is_not_believed(stand_in, words, installed, caplog):
    from dropforge_kernels.modules.fa4 import usable

    installed(stand_in)
    q = torch.randn(48, HEADS, WIDTH)
    assert not usable(q, GROUPS, 48) and not usable(q, GROUPS, 48)
    assert caplog.text.count("FlashAttention 4 is not used for heads of 16") == 1 and words in caplog.text


def test_short_rows_and_comparisons_do_without(installed):
    from dropforge_kernels.modules.fa4 import switch, usable, without_fa4

    used = installed(StandIn())
    q = torch.randn(48, HEADS, WIDTH)
    assert not usable(q, GROUPS, 23) and not used.calls
    with without_fa4():
        assert not usable(q, GROUPS, 48) and not used.calls
    assert usable(q, GROUPS, 48) and len(used.calls) == 2
    switch(False)
    assert not usable(q, GROUPS, 48)


def test_it_is_not_asked_where_it_is_not_installed():
    from dropforge_kernels.modules.fa4 import usable
    from dropforge_kernels.ops._attention_fa4 import fa4_missing

    assert fa4_missing() is None or not usable(torch.randn(4096, HEADS, WIDTH), GROUPS, 4096)
