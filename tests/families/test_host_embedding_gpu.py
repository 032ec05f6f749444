"""The embedding in pinned host memory on a real GPU: memory, equality, CUDA graphs, and back."""

from __future__ import annotations

import pytest
import torch
from dropforge_kernels.testing import no_waits

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 32_000, 1024


def model_of(dtype=torch.bfloat16):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", dtype).train()
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_the_table_leaves_the_gpu_and_comes_back():
    from dropforge_kernels.patch.session import patched

    model = model_of()
    ids = torch.randint(ROWS, (2, 512), device="cuda")
    with patched(model):
        expected = step(model, ids)
    before = torch.cuda.memory_allocated()
    with patched(model, offload_embedding=True):
        table = model.get_input_embeddings().weight
        assert table.is_pinned()
        left, adapters = before - torch.cuda.memory_allocated(), 2 * sum(p.numel() for p in trained(model))
        assert (
            left >= ROWS * WIDTH * 2 - 8 * adapters
        )  # what the session itself needs, copies of the adapters above all
        model.to("cuda")
        assert not table.is_cuda and model.device.type == "cuda"
        assert all(torch.equal(a, b) for a, b in zip(step(model, ids), expected, strict=True))
        with torch.no_grad():
            assert model.generate(ids[:, :8], max_new_tokens=4).shape == (2, 12)
    assert model.get_input_embeddings().weight.is_cuda


def test_rows_are_fetched_in_a_graph_without_a_wait():
    from dropforge_kernels.ops._host_rows import host_rows

    table = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16).pin_memory()
    ids = torch.randint(ROWS, (4096,), device="cuda")
    host_rows(table, ids, pinned=True)
    torch.cuda.synchronize()
    with no_waits():
        host_rows(table, ids, pinned=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = host_rows(table, ids, pinned=True)
    for _ in range(3):
        ids.random_(ROWS)
        graph.replay()
        assert torch.equal(rows.cpu(), table[ids.cpu()])
