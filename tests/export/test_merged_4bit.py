"""NF4 folders: what transformers and bitsandbytes make of them, and damage that must not pass."""

from __future__ import annotations

import pytest
import torch
from dropforge.errors import ExportError
from dropforge.export.export_merged_4bit import BLOCK, STORED, export_merged_4bit, quantize
from dropforge.export.quantized_folder import linear_layers
from dropforge.export.safetensors_stream import index_folder
from dropforge.export.verify_quantized import NF4, verify_quantized
from export_harness import copy, edit_json, edit_tensors

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(benches, tmp_path_factory):
    made = {}
    for name, bench in benches.items():
        folder = tmp_path_factory.mktemp(f"nf4-{name}")
        made[name] = (folder, export_merged_4bit(bench.stage, folder).checks)
    return made


def test_everything_bitsandbytes_makes_is_announced():
    parts = quantize(torch.randn(64, 128, dtype=torch.float16))
    assert set(parts) == set(STORED)
    assert parts[""].shape == (64 * 128 // 2, 1)


def test_measured_numbers(bench, folders):
    folder, checks = folders[bench.name]
    assert checks["matrices_quantized"] == 14
    assert checks["left_in_16_bits"] == ["lm_head"]
    assert 0.08 < checks["worst_weight_error"] < 0.11
    assert 0.1 < checks["logits"]["relative_error"] < 0.5
    assert index_folder(folder)[UP].dtype == "U8"


def test_transformers_answers_from_the_folder_alone(llama, folders):
    """Loaded as a user loads it: no settings, and the weights are really four bits in memory."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = folders["tiny-llama"]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map={"": "cpu"})
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, Linear4bit) and layer.weight.quant_state.nested
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("Hello")["input_ids"]])
    with torch.no_grad():
        assert bool(model(input_ids=ids).logits.isfinite().all())


@pytest.fixture
def damaged(folders, tmp_path):
    return copy(folders["tiny-llama"][0], tmp_path / "nf4")


def refused(bench, folder) -> str:
    source = bench.stage.merged.folder
    layers = linear_layers(source, multiple=BLOCK, what="merged_4bit")
    with pytest.raises(ExportError) as error:
        verify_quantized(folder, source=source, layers=layers, answers=bench.stage.merged.answers, limits=NF4)
    assert error.value.code == "export-quantize-wrong"
    return f"{error.value.problems[0].what} {error.value.problems[0].why}"


def test_scales_in_another_order(llama, damaged):
    edit_tensors(damaged, lambda t: {**t, f"{UP}.absmax": t[f"{UP}.absmax"].flip(0)})
    assert UP in refused(llama, damaged)


def test_nibbles_swapped(llama, damaged):
    edit_tensors(damaged, lambda t: {**t, UP: (t[UP] >> 4) | (t[UP] << 4)})
    assert UP in refused(llama, damaged)


def test_a_changed_embedding(llama, damaged):
    name = "model.embed_tokens.weight"
    edit_tensors(damaged, lambda t: {**t, name: t[name].flip(0)})
    assert name in refused(llama, damaged)


def test_a_configuration_that_computes_something_else(llama, damaged):
    edit_json(damaged / "config.json", rms_norm_eps=10.0)
    assert "predicts something else" in refused(llama, damaged)
