"""The engine's hand-written layers against transformers and PEFT, in fp32: loss and the gradient of every A and B.

Tolerance: as in test_parity, fp32 with another order of the same operations.
"""

from __future__ import annotations

import pytest
import torch

TOLERANCE = 2e-5
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite")


def adapted(model, **fields):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    # transformers' sdpa attention leaves out Gemma 2's capped scores.
    model.set_attn_implementation("eager" if model.config.model_type == "gemma2" else "sdpa")
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).train()


def step(model, batch, **extra):
    model.zero_grad()
    output = model(**batch, **extra)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(got, want):
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))


def assert_same(got, want):
    assert distance(got[0], want[0]) < TOLERANCE
    assert got[1].keys() == want[1].keys()
    worst = sorted(((distance(got[1][name], want[1][name]), name) for name in want[1]), reverse=True)
    assert worst[0][0] < TOLERANCE, worst[:3]


def engine_of(model):
    """(session, engine) of an open session; the engine must be in."""
    from dropforge_kernels.patch.session import open_session

    session = open_session(model)
    assert session.engine is not None, session.report.engine
    return session, session.engine


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", ["keep", "keep_attention", "recompute", "offload_output"])
def test_loss_and_every_gradient(family, keep, tiny, batch):
    from dropforge_kernels.modules.offload import HostStore
    from dropforge_kernels.modules.policy import Keep

    model = adapted(tiny(family))
    want = step(model, batch)
    assert len(want[1]) >= 2 * 4 * 2
    session, engine = engine_of(model)
    try:
        store = HostStore() if Keep(keep).on_host else None
        engine.set_policies([Keep(keep)] * 2, mlp_tile=5 if keep == "recompute" else None, store=store)
        assert_same(step(model, batch), want)
        whole = {key: value[:1] for key, value in batch.items() if key != "attention_mask"}
        without_padding = step(model, whole)
    finally:
        session.close()
    assert_same(without_padding, step(model, whole))
    assert_same(step(model, batch), want)


def packed_batch(batch, *, spare=2):
    """Three documents in one row, as the trainer packs them, with empty documents at the end."""
    documents = [batch["input_ids"][0, :5], batch["input_ids"][0, 5:13], batch["input_ids"][1, :7]]
    labels = [d.clone() for d in documents]
    labels[1][:3] = -100
    lengths = torch.tensor([len(d) for d in documents])
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    edges = torch.cat([edges, edges[-1:].expand(spare)]).to(torch.int32)
    shifted = torch.cat([torch.nn.functional.pad(x, (0, 1), value=-100)[1:] for x in labels])[None]
    packed = {
        "input_ids": torch.cat(documents)[None], "labels": shifted, "shift_labels": shifted,
        "position_ids": torch.cat([torch.arange(len(d)) for d in documents])[None],
        "cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 13, "max_length_k": 13, "use_cache": False,
    }  # fmt: skip
    return packed, [{"input_ids": d[None], "labels": x[None]} for d, x in zip(documents, labels, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_alone(family, tiny, batch):
    model = adapted(tiny(family))
    packed, alone = packed_batch(batch)
    counted = sum(int((one["labels"][:, 1:] != -100).sum()) for one in alone)
    items = torch.tensor(counted)
    model.zero_grad()
    losses = []
    for one in alone:
        loss = model(**one, num_items_in_batch=items).loss
        loss.backward()
        losses.append(loss.detach())
    want = sum(losses), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    session, _ = engine_of(model)
    try:
        got = step(model, packed, num_items_in_batch=items, max_valid=counted)
    finally:
        session.close()
    assert_same(got, want)


def test_one_document_does_not_see_another(tiny, batch):
    """Another token in the first document leaves the hidden states of the others bit for bit as they were."""
    from dropforge_kernels.patch.engine_call import final_hidden

    model = adapted(tiny("llama"))
    packed, _ = packed_batch(batch)
    inputs = {name: value for name, value in packed.items() if "labels" not in name}
    session, _ = engine_of(model)
    with torch.no_grad():
        before = final_hidden(session.engine, inputs)
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][0, 1] += 1
        after = final_hidden(session.engine, inputs)
    session.close()
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, :5], after[:, :5])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "o_proj", "up_proj"]])
def test_adapters_on_some_projections(targets, tiny, batch):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny("qwen2"), config).train()
    want = step(model, batch)
    session, _ = engine_of(model)
    got = step(model, batch)
    session.close()
    assert_same(got, want)


def test_ranks_and_scales_of_their_own_within_a_group(tiny, batch):
    model = adapted(tiny("llama"), rank_pattern={"k_proj": 2, "up_proj": 5}, alpha_pattern={"v_proj": 11, "o_proj": 4})
    want = step(model, batch)
    session, engine = engine_of(model)
    assert {part.scale for part in engine.decoder.layers[0].qkv.parts} == {1.5, 3.0, 2.75}
    got = step(model, batch)
    session.close()
    assert_same(got, want)


def test_trained_embeddings_and_head(tiny, batch):
    model = adapted(tiny("llama"), modules_to_save=["embed_tokens", "lm_head"])
    want = step(model, batch)
    assert any("embed_tokens" in name for name in want[1]) and any("lm_head" in name for name in want[1])
    session, _ = engine_of(model)
    got = step(model, batch)
    session.close()
    assert_same(got, want)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora_dropout": 0.1}, "its adapter has dropout"),
        ({"use_dora": True}, "its adapter is a Dora"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "its base weights are trained"),
    ],
)
def test_what_the_engine_leaves_alone(fields, reason, tiny, batch):
    from dropforge_kernels.patch.session import patched

    model = adapted(tiny("qwen2"), **fields)
    with patched(model) as report:
        assert report.engine == f"decoder layers run operation by operation: {reason}"
        assert torch.isfinite(model(**batch).loss)


def test_weights_are_the_same_tensors_before_during_and_after(tiny, batch):
    from dropforge_kernels.patch.session import patched

    model = adapted(tiny("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with patched(model):
        during = model.state_dict()
        assert all(torch.equal(during[name], value) and during[name].is_contiguous() for name, value in before.items())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    storages = {value.untyped_storage().data_ptr() for name, value in after.items()}
    assert len(storages) == len(after)


def test_an_adapter_switched_off_is_not_trained(tiny, batch):
    """What changes after the session was opened is seen at the next forward."""
    model = adapted(tiny("llama"))
    session, _ = engine_of(model)
    with model.disable_adapter():
        off = model(**batch).loss.detach()
    on = model(**batch).loss.detach()
    assert session.report.declined == {"its adapter is switched off or merged": 1}
    session.close()
    with model.disable_adapter():
        assert distance(off, model(**batch).loss.detach()) < TOLERANCE
    assert distance(on, model(**batch).loss.detach()) < TOLERANCE
    assert distance(on, off) > 100 * TOLERANCE


def test_two_forwards_before_two_backwards(tiny, batch):
    model = adapted(tiny("llama"))
    session, _ = engine_of(model)
    items = torch.tensor(10)
    model.zero_grad()
    losses = [model(**{k: v[r : r + 1] for k, v in batch.items()}, num_items_in_batch=items).loss for r in range(2)]
    (losses[0] + losses[1]).backward()
    got = (
        losses[0].detach() + losses[1].detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )
    session.close()
    assert_same(got, step(model, batch, num_items_in_batch=items))


@pytest.mark.parametrize(
    ("family", "keep"), [("llama", "keep"), ("llama", "keep_output"), ("qwen3", "offload_output"), ("gemma2", "keep")]
)
def test_kernels_of_a_packed_step(family, keep, tiny, batch):
    """The same through the Triton kernels, in their interpreter where there is no GPU."""
    from dropforge_kernels.dispatch import Backend, forced
    from dropforge_kernels.modules.offload import HostStore
    from dropforge_kernels.modules.policy import Keep

    model = adapted(tiny(family))
    packed, _ = packed_batch(batch)
    session, engine = engine_of(model)
    items = torch.tensor(12)
    want = step(model, packed, num_items_in_batch=items)
    engine.set_policies([Keep(keep)] * 2, store=HostStore())
    with forced(Backend.TRITON):
        got = step(model, packed, num_items_in_batch=items)
    session.close()
    assert_same(got, want)


def test_another_active_adapter_is_the_one_that_trains(tiny, batch, caplog):
    """The engine has read the first adapter; with a second one active it must stand aside, and say so."""
    from peft import LoraConfig

    model = adapted(tiny("llama"))
    torch.manual_seed(8)
    model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("default")
    session, _ = engine_of(model)
    model.set_adapter("second")
    got = step(model, batch)
    assert list(session.report.declined.values()) == [1]
    assert "the hand-written layers stand aside: another adapter is active" in caplog.text
    session.close()
    want = step(model, batch)
    assert all("second" in name for name in want[1])
    assert_same(got, want)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"output_hidden_states": True}, "attentions or hidden states were asked for"),
        ({"something": 1}, "the forward was given something"),
    ],
)
def test_calls_left_to_the_model_are_counted(extra, reason, tiny, batch):
    from dropforge_kernels.patch.engine_call import final_hidden

    model = adapted(tiny("llama"))
    session, engine = engine_of(model)
    assert final_hidden(engine, {"input_ids": batch["input_ids"], **extra}) is None
    assert any(reason in line for line in session.report.lines())
    session.close()
