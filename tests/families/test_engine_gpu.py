"""The engine on a GPU in bf16: not further from fp32 than transformers and PEFT are, and the same inside a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch

pytestmark = pytest.mark.gpu
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite")
WIDER = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def model_of(tiny):
    """model_of(family): a small model on the GPU in fp32 with an adapter, weights as at birth."""

    def make(family):
        from peft import LoraConfig, get_peft_model

        heads = {"head_dim": 64} if family in ("qwen3", "gemma2", "gemma3_text") else {}
        windows = {"sliding_window": 48} if family in ("mistral", "gemma2", "gemma3_text", "phi3") else {}
        model = tiny(family, **WIDER, **heads, **windows).cuda()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
        # transformers' sdpa attention leaves out Gemma 2's capped scores.
        model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
        config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, config).train()

    return make


def packed_batch():
    torch.manual_seed(2)
    lengths = [100, 37, 200, 1, 150]
    total = sum(lengths)
    edges = torch.tensor([0, *lengths, 0, 0]).cumsum(0).to(torch.int32)
    ids = torch.randint(3, 500, (total,))
    targets = torch.full((total,), -100)
    positions = torch.cat([torch.arange(n) for n in lengths])
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        targets[first : max(first, last - 1)] = ids[first + 1 : last]
    shared = {"cu_seq_lens_q": edges.cuda(), "cu_seq_lens_k": edges.cuda(), "max_length_q": 256, "max_length_k": 256}
    batch = {"input_ids": ids, "labels": targets, "shift_labels": targets, "position_ids": positions}
    items = torch.tensor(int((targets >= 0).sum()), device="cuda")
    packed = {name: value[None].cuda() for name, value in batch.items()} | shared
    documents = [
        ids[a:b][None].cuda() for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True) if b > a + 1
    ]
    return packed | {"num_items_in_batch": items, "max_valid": total, "use_cache": False}, documents, items


def gradients(model):
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, documents, items):
    """Loss and gradients of the documents one by one, by the model's own path."""
    model.zero_grad()
    losses = []
    for ids in documents:
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach().float())
    return sum(losses), gradients(model)


def relative(got, want):
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", ["keep", "keep_output", "recompute", "offload_output"])
def test_packed_bf16_is_not_worse_than_peft(family, keep, model_of):
    from dropforge_kernels.modules.offload import HostStore
    from dropforge_kernels.modules.policy import Keep
    from dropforge_kernels.patch.session import open_session

    wide = model_of(family)
    half = copy.deepcopy(wide)
    for name, parameter in half.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
            wide.get_parameter(name).data = parameter.data.float()
    packed, documents, items = packed_batch()
    truth = alone(wide, documents, items)
    with torch.autocast("cuda", torch.bfloat16):
        usual = alone(half, documents, items)
    session = open_session(half)
    assert session.engine is not None, session.report.engine
    session.engine.set_policies([Keep(keep)] * 2, store=HostStore(depth=2), mlp_tile=100)
    half.zero_grad()
    loss = half(**packed).loss
    loss.backward()
    ours = gradients(half)
    session.close()
    assert abs(float(loss.detach()) - float(truth[0])) / float(truth[0]) < 2e-3
    ours_error, usual_error = relative(ours, truth[1]), relative(usual[1], truth[1])
    worst = {name: ours_error[name] / (2 * usual_error[name] + 1e-3) for name in ours_error}
    assert max(worst.values()) < 1, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_same_bits_inside_a_graph(family, model_of):
    from dropforge_kernels.patch.session import open_session

    model = model_of(family).bfloat16()
    packed, _, _ = packed_batch()
    session = open_session(model)
    assert session.engine is not None, session.report.engine
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(**packed).loss.backward()
        eager = [p.grad.clone() for p in trained]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        model(**packed).loss.backward()
    for parameter in trained:
        parameter.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    session.close()
    assert all(torch.equal(p.grad, before) for p, before in zip(trained, eager, strict=True))
