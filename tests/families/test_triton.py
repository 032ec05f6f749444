"""The Triton kernels themselves (in the interpreter) accept what the families hand them: strides, positions, dtypes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter_with_numpy_2_4(monkeypatch):
    """As in tests/kernels/conftest.py: triton 3.6's interpreter turns counts into an index in a way numpy 2.4 refuses."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without CUDA")
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def with_item(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_item)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_one_step_through_the_kernels(family, tiny, batch):
    from dropforge_kernels.dispatch import Backend, forced
    from dropforge_kernels.patch.session import patched

    model = tiny(family)
    gradients = []
    losses = []
    for backend in (Backend.REFERENCE, Backend.TRITON):
        model.zero_grad()
        with patched(model, policy="required"), forced(backend):
            loss = model(**batch).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert torch.allclose(losses[0], losses[1], rtol=2e-5)
    for name, want in gradients[0].items():
        error = float((gradients[1][name] - want).abs().max() / want.abs().max().clamp(min=1e-12))
        assert error < 5e-5, (name, error)
