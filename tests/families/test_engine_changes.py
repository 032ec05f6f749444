"""What somebody does to a model after the engine was built is noticed at the next forward, counted and said."""

from __future__ import annotations

import pytest
import torch


def adapted(model, **fields):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).train()


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=2e-5, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert float((got[1][name] - gradient).abs().max()) <= 2e-5 * float(gradient.abs().max()), name


def engine_of(model):
    """(session, engine) of an open session; the engine must be in."""
    from dropforge_kernels.patch.session import open_session

    session = open_session(model)
    assert session.engine is not None, session.report.engine
    return session, session.engine


def adapter_elsewhere(model):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(8)
    config = LoraConfig(r=3, target_modules=["down_proj"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(config, model.get_base_model(), adapter_name="default")


def adapter_on_the_head(model):
    from peft import LoraConfig

    torch.manual_seed(8)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def trained_norm(model):
    model.get_base_model().model.layers[1].input_layernorm.weight.requires_grad_()


def trained_base(model):
    model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_()


def hook_on_a_layer(model):
    model.get_base_model().model.layers[1].register_forward_hook(lambda module, inputs, output: None)


def hook_on_a_projection(model):
    model.get_base_model().model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def another_layer(model):
    layers = model.get_base_model().model.layers
    layers[0], layers[1] = layers[1], layers[0]


CHANGES = {
    adapter_elsewhere: "another module is in the place of a projection",
    adapter_on_the_head: "its head is a peft",
    trained_norm: "something besides the adapters",
    trained_base: "something besides the adapters",
    hook_on_a_layer: "a hook watches its layers",
    hook_on_a_projection: "a hook watches its projections",
    another_layer: "its layers were exchanged",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_later_change_reaches_loss_and_gradients(change, tiny, batch, caplog):
    model = adapted(tiny("llama"), target_modules=["q_proj", "v_proj"])
    session, _ = engine_of(model)
    before = step(model, batch)
    assert not session.report.declined
    change(model)
    got = step(model, batch)
    assert list(session.report.declined.values()) == [1] and CHANGES[change] in next(iter(session.report.declined))
    assert f"the hand-written layers stand aside: {CHANGES[change]}" in caplog.text
    session.close()
    assert_same(got, step(model, batch))
    if "hook_on_a_layer" not in change.__name__:
        assert got[1].keys() != before[1].keys() or abs(float(got[0] - before[0])) > 1e-6


def test_a_frozen_head_of_another_dtype_is_cast_once(tiny, batch, monkeypatch):
    """fp32 embeddings and head beside bf16 layers, as prepare_model_for_kbit_training leaves them."""
    model = adapted(tiny("llama").bfloat16())
    base = model.get_base_model()
    base.lm_head.float()
    casts = []
    plain = torch.Tensor.to

    def counted(tensor, *arguments, **options):
        if tensor.data_ptr() == base.lm_head.weight.data_ptr():
            casts.append(arguments)
        return plain(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    session, engine = engine_of(model)
    first, second = step(model, batch), step(model, batch)
    assert len(casts) == 1, "once, when the engine is built"
    assert_same(first, second)
    with torch.no_grad():
        base.lm_head.weight.mul_(1.5)
    changed = step(model, batch)
    assert abs(float(changed[0] - first[0])) > 0.1, "a head that somebody changed is cast again"
    session.close()
    assert engine.head is None


def test_a_trained_head_is_cast_at_every_forward(tiny, batch):
    """Its fp32 master learns: what an optimizer wrote a moment ago is what the next forward uses."""
    model = adapted(tiny("llama").bfloat16(), modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"]
    head.float()
    session, engine = engine_of(model)
    assert engine.head is None
    before = step(model, batch)
    assert head.weight.grad.dtype is torch.float32 and float(head.weight.grad.abs().sum()) > 0
    head.weight.data.mul_(1.5)
    assert abs(float(step(model, batch)[0] - before[0])) > 0.1
    session.close()
