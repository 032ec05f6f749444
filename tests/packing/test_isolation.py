"""Packed documents compute what each computes alone, in every family, and cannot see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dropforge.packing.choose import choose_packing
from dropforge.packing.collate import collate, collate_step, model_inputs
from dropforge.packing.rows import TokenRows
from dropforge_kernels.patch.attention_interface import packed_attention
from torch import nn

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OWN = {
    "mistral": {"sliding_window": 5}, "qwen3": {"head_dim": 16}, "qwen2": {},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "llama": {}, "granite": {"logits_scaling": 3.0}, "olmo2": {}, "smollm3": {},
}  # fmt: skip
"""The last two are families without patches: the attention interface alone must do."""


def tiny(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **OWN[family]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # weights at birth are so small that a layer changes nothing
                parameter.mul_(3)
    return model.eval()


def nll(model, inputs):
    """(tokens,) loss of every target, zero where nothing is learnt."""
    arguments = {
        k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", "num_items_in_batch", "max_valid")
    }
    with torch.no_grad():
        logits = model(**arguments).logits[0]
    targets = inputs.get("shift_labels", inputs.get("targets"))[0]
    return nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="none")


@pytest.fixture
def bucket(rows):
    data = rows(12, mean=20, longest=60)
    plan = choose_packing(data, documents_per_step=12, per_micro=4, budget=1024, seed=2).plan
    (found,) = plan.epoch(0)[0]
    return data, found


@pytest.mark.parametrize("family", OWN)
def test_packed_equals_alone_and_neighbours_are_invisible(bucket, family):
    data, found = bucket
    model = tiny(family)
    micro = collate(data, found, pad=0, pin=False, items=1)
    with packed_attention(model):
        packed = nll(model, model_inputs(micro.flat, micro.shape))
        changed_rows = TokenRows(data.input_ids.copy(), data.targets, data.starts)
        victim = max(found.documents, key=lambda document: data.lengths[document])
        at = data.starts[victim] + data.lengths[victim] // 2
        changed_rows.input_ids[at] = 3 + (changed_rows.input_ids[at] - 3 + 1) % 94
        other = collate(changed_rows, found, pad=0, pin=False, items=1)
        changed = nll(model, model_inputs(other.flat, other.shape))
    place = 0
    for document in found.documents:
        start, stop = data.starts[document], data.starts[document + 1]
        length = int(stop - start)
        ours = packed[place : place + length]
        alone = nll(model, {
            "input_ids": torch.tensor(data.input_ids[None, start:stop].astype(np.int64)),
            "targets": torch.tensor(data.targets[None, start:stop].astype(np.int64)),
        })  # fmt: skip
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
        same = torch.equal(ours, changed[place : place + length])
        assert same == (document != victim), f"document {document}"
        place += length


def test_gradient_is_equal_for_any_split(rows):
    """1, 2 and 4 micro-batches of the same 16 documents."""
    data = rows(16, mean=20, longest=60)
    gradients = []
    for per_micro in (16, 8, 4):
        plan = choose_packing(data, asked=False, documents_per_step=16, per_micro=per_micro, seed=2).plan
        step = collate_step(data, plan.epoch(0)[0], pad=0, pin=False, counted=plan.counted)
        assert len(step.micro) == 16 // per_micro
        model = tiny("llama").train()
        with packed_attention(model):
            for micro in step.micro:
                inputs = model_inputs(micro.flat, micro.shape)
                inputs.pop("max_valid")
                model(**inputs).loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    for other in gradients[1:]:
        assert torch.linalg.vector_norm(other - gradients[0]) < 2e-6 * torch.linalg.vector_norm(gradients[0])


def test_padded_batches_and_generation_still_work_inside(bucket):
    model = tiny("gemma2")
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    plain = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids[:, :4], max_new_tokens=5, do_sample=False)
    with packed_attention(model):
        inside = model(input_ids=ids, attention_mask=mask).logits
        again = model.generate(ids[:, :4], max_new_tokens=5, do_sample=False)
    torch.testing.assert_close(inside[mask.bool()], plain[mask.bool()], rtol=2e-4, atol=2e-4)
    assert torch.equal(generated, again)


def test_the_old_attention_comes_back(bucket):
    model = tiny("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), packed_attention(model):
        assert model.config._attn_implementation == "dropforge"
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before
