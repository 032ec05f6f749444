"""FlashAttention 4 on a GPU that has it: believed after its trial, and a layer's gradient as near to fp32 as cuDNN's."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
HEADS, GROUPS, WIDTH = 32, 8, 128


def gradient(qkv, dout, rows):
    from dropforge_kernels.modules.joint_attention import attend, attend_backward
    from dropforge_kernels.modules.layer import AttentionShape, Frame

    tokens = qkv.shape[0]
    still = torch.ones(tokens, WIDTH // 2, device="cuda"), torch.zeros(tokens, WIDTH // 2, device="cuda")
    shape = AttentionShape(heads=HEADS, groups=GROUPS, width=WIDTH, scale=WIDTH**-0.5)
    frame = Frame(tables={"": still}, rows=rows)
    state = attend(shape, qkv.clone(), frame)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = attend_backward(shape, dout, state, frame)
    torch.cuda.synchronize()
    return state, made, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("rows", "length", "split_from"), [(2, 2048, 1 << 30), (1, 4096, 1)])
def test_it_is_as_near_to_fp32_as_cudnn(rows, length, split_from, monkeypatch):
    from dropforge_kernels.modules import fa4, head_pieces
    from dropforge_kernels.modules.memory_peak import LayerBytes
    from dropforge_kernels.modules.model_shape import ModelShape, Training

    if fa4.fa4_missing() is not None:
        pytest.skip(fa4.fa4_missing())
    monkeypatch.setattr(head_pieces, "SPLIT_FROM", split_from)
    torch.manual_seed(0)
    tokens = rows * length
    qkv = torch.randn(tokens, (HEADS + 2 * GROUPS) * WIDTH, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(tokens, HEADS * WIDTH, device="cuda", dtype=torch.bfloat16)
    state, ours, used = gradient(qkv, dout, rows)
    assert state.lse.dim() == 2, "FlashAttention 4 was not used; the log says why"
    with fa4.without_fa4():
        other, cudnn, _ = gradient(qkv, dout, rows)
    assert other.lse.dim() == 4
    leaf = qkv.float().requires_grad_()
    parts = leaf.view(rows, length, HEADS + 2 * GROUPS, WIDTH).transpose(1, 2).split((HEADS, GROUPS, GROUPS), 1)
    out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=WIDTH**-0.5, enable_gqa=True)
    (exact,) = torch.autograd.grad(out.transpose(1, 2).reshape(tokens, -1), leaf, dout.float())
    errors = [float((made.float() - exact).norm() / exact.norm()) for made in (ours, cudnn)]
    assert errors[0] < 1.5 * errors[1] + 1e-3, errors
    shape = ModelShape(
        layers=1, hidden=4096, intermediate=14336, queries=HEADS * WIDTH, keys=GROUPS * WIDTH, heads=HEADS, vocabulary=1
    )  # fmt: skip
    each = LayerBytes.of(shape, Training.of_rank(0), row=tokens if rows == 1 else 0)
    planned = tokens * (each.attention_backward - each.output)
    print(f"FlashAttention 4's backward takes {used / 2**20:.0f} MiB, planned {planned / 2**20:.0f}")
    assert used <= 1.02 * planned + (32 << 20)
