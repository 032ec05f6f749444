"""cuDNN's backward on some heads at a time: the same gradients, and the scratch that the planner counts on."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
HEADS, GROUPS, WIDTH = 32, 8, 128


def shape_and_frame(tokens):
    from dropforge_kernels.modules.layer import AttentionShape, Frame

    angles = torch.rand(tokens, WIDTH // 2, device="cuda")
    frame = Frame(tables={"": (angles.cos(), angles.sin())}, rows=1)
    return AttentionShape(heads=HEADS, groups=GROUPS, width=WIDTH, scale=WIDTH**-0.5), frame


def gradient(tokens, monkeypatch, split_from):
    """(dqkv, bytes at the peak beyond what was there, dqkv among them)."""
    from dropforge_kernels.modules import head_pieces
    from dropforge_kernels.modules.joint_attention import attend, attend_backward, way

    monkeypatch.setattr(head_pieces, "SPLIT_FROM", split_from)
    torch.manual_seed(0)
    shape, frame = shape_and_frame(tokens)
    qkv = torch.randn(tokens, (HEADS + 2 * GROUPS) * WIDTH, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(tokens, HEADS * WIDTH, device="cuda", dtype=torch.bfloat16)
    assert way(shape, frame, qkv) == "dense"
    state = attend(shape, qkv, frame)
    attend_backward(shape, dout, state, frame)  # plans and libraries are loaded here
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dqkv = attend_backward(shape, dout, state, frame)
    torch.cuda.synchronize()
    return dqkv, torch.cuda.max_memory_allocated() - before


def test_heads_in_pieces_give_the_same_gradient(monkeypatch):
    whole, _ = gradient(3000, monkeypatch, 1 << 30)
    split, _ = gradient(3000, monkeypatch, 1)
    assert float((split.float() - whole.float()).norm() / whole.float().norm()) < 2e-3


@pytest.mark.parametrize("split_from", [1, 1 << 30])
def test_the_scratch_is_at_most_what_is_planned(monkeypatch, split_from):
    from dropforge_kernels.modules import head_pieces
    from dropforge_kernels.modules.memory_peak import LayerBytes
    from dropforge_kernels.modules.model_shape import ModelShape, Training

    tokens = 32768
    shape = ModelShape(
        layers=1, hidden=4096, intermediate=14336, queries=HEADS * WIDTH, keys=GROUPS * WIDTH, heads=HEADS, vocabulary=1
    )  # fmt: skip
    _, used = gradient(tokens, monkeypatch, split_from)
    monkeypatch.setattr(head_pieces, "SPLIT_FROM", split_from)
    each = LayerBytes.of(shape, Training.of_rank(0), row=tokens)
    planned = tokens * (each.attention_backward - each.output)  # d output was there before
    print(f"cuDNN's backward takes {used / 2**30:.3f} GiB, planned {planned / 2**30:.3f}")
    assert used <= 1.02 * planned + (32 << 20)
