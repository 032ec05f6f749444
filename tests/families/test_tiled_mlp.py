"""The MLP in tiles because it was asked for: the same loss and gradients, with and without a plan."""

from __future__ import annotations

import pytest
import torch


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_numbers(family, checkpointing, tiny, batch, monkeypatch, adapted):
    from dropforge_kernels.modules import decoder_layer
    from dropforge_kernels.patch import engine_call
    from dropforge_kernels.patch.session import open_session

    monkeypatch.setattr(engine_call, "TILE", 5)
    model = adapted(tiny(family))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    sizes, half = [], decoder_layer.mlp_half

    def seen(layer, y, weights, tile):
        sizes.append(y.shape[0])
        return half(layer, y, weights, tile)

    monkeypatch.setattr(decoder_layer, "mlp_half", seen)
    found = {}
    for tiled in (False, True):
        sizes.clear()
        session = open_session(model, tiled_mlp=tiled)
        found[tiled] = step(model, batch)
        assert session.engine.tiled_mlp is tiled and (min(sizes) <= 5) is tiled
        session.close()
    assert torch.allclose(found[True][0], found[False][0], rtol=1e-5)
    for name, gradient in found[False][1].items():
        assert (found[True][1][name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-8, name


def test_without_hand_written_layers_it_is_said(tiny, caplog):
    from dropforge_kernels.patch.session import open_session

    for policy, why in (("auto", "none of its layers has a trained adapter"), ("off", "are not in this model")):
        open_session(tiny("llama").requires_grad_(False), policy=policy, tiled_mlp=True)
        assert "tiled_mlp has no effect" in caplog.text and why in caplog.text
