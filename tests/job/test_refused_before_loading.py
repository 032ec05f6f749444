"""What a job asks of a model that does not fit is refused before any weight is read."""

from __future__ import annotations

import pytest
from dropforge.errors import InputError


@pytest.mark.parametrize(
    ("text", "code", "where", "fix"),
    [
        ({"extra": "adapter: {target_modules: [q_prj]}"}, "adapter-target-unknown", "adapter.target_modules", "'q_proj'"),
        ({"extra": "adapter: {modules_to_save: [embed_token]}"}, "adapter-target-unknown", "adapter.modules_to_save", "embed_tokens"),
        ({"extra": "adapter: {layers_to_transform: [0, 2]}"}, "api-layers", "adapter.layers_to_transform", "from 0 to 1"),
        ({"model": "{id: 'builtin:tiny-llama', max_seq_length: 4096}"}, "model-length", "model.max_seq_length", "2048"),
    ],
)  # fmt: skip
def test_refused(bench, make_spec, monkeypatch, text, code, where, fix):
    from transformers import AutoModelForCausalLM

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    run = bench.run_folder(make_spec(**text))
    with pytest.raises(InputError) as caught:
        bench.go(run)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == (code, where) and fix in problem.fix


def test_layers_of_all_linear(bench, make_spec):
    """PEFT takes layer numbers beside names only; the default names every linear layer."""
    from safetensors.torch import load_file

    run = bench.run_folder(make_spec(extra="adapter: {layers_to_transform: [1]}", train="max_steps: 1"))
    bench.go(run)
    names = list(load_file(bench.result(run).adapter / "adapter_model.safetensors"))
    assert names and all(".layers.1." in name for name in names)
