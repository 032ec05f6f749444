"""PiSSA and OLoRA adapters, saved as plain LoRA, must be the trained model on the untouched base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from dropforge.export.adapter_file import read_adapter
from dropforge.models.builtin import build_builtin
from dropforge.models.load import attach_adapter
from dropforge.models.plain_lora import initial_pairs, to_plain_lora
from dropforge.spec import AdapterSpec

IDS = torch.arange(5, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_builtin("tiny-qwen3", folder)
    return folder


def load(base: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(base: Path, folder: Path, *, convert: bool = True, **fields):
    """Attach, change every trained weight as a training would, save; returns the trained model's logits."""
    adapter = AdapterSpec(r=8, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints about these initialisations
        model = attach_adapter(load(base), adapter, seed=1, checkpointing=False)
        initial = initial_pairs(model, init=adapter.init_lora_weights)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        truth = logits(model)
        model.save_pretrained(folder)
    to_plain_lora(folder, initial if convert else {})
    return truth


def error(base: Path, folder: Path, truth) -> float:
    from peft import PeftModel

    found = logits(PeftModel.from_pretrained(load(base), folder))
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_untouched_base_with_the_saved_adapter_is_the_trained_model(base, init, fields, tmp_path):
    truth = trained(base, tmp_path, init_lora_weights=init, **fields)
    assert float((logits(load(base)) - truth).norm() / truth.norm()) > 0.05, "the training changed something"
    assert error(base, tmp_path, truth) < 1e-4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (16, True)
    assert read_adapter(tmp_path).changes, "the exporters take it"


def test_without_the_conversion_it_would_be_another_model(base, tmp_path):
    """To every reader but PEFT, which would take the part out of the base again, a pair of matrices is plain LoRA."""
    truth = trained(base, tmp_path, init_lora_weights="pissa", convert=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    assert error(base, tmp_path, truth) > 0.05


def test_ordinary_adapters_are_left_alone(base, tmp_path):
    truth = trained(base, tmp_path, init_lora_weights="gaussian")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    assert error(base, tmp_path, truth) < 1e-5
