"""FP8 folders: the arithmetic, what transformers makes of them, and damage that must not pass."""

from __future__ import annotations

import json

import pytest
import torch
from dropforge.errors import ExportError
from dropforge.export.export_fp8 import export_fp8
from dropforge.export.fp8_format import quantize, scale_shape, spread
from dropforge.export.quantized_folder import linear_layers
from dropforge.export.safetensors_stream import index_folder, read_tensor
from dropforge.export.verify_quantized import FP8, verify_quantized
from export_harness import copy, edit_json, edit_tensors

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("strategy", ["channel", "block"])
@pytest.mark.parametrize("shape", [(256, 384), (130, 257), (1, 16)])
def test_every_value_is_within_half_a_step(strategy, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0] = 0
    values, scale = quantize(weight, strategy=strategy)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert tuple(scale.shape) == scale_shape(shape, strategy=strategy)
    factor = spread(scale, shape).expand(shape)
    error = (values.float() * factor - weight).abs()
    # Three bits of mantissa: half a step is 2^-4 of the value; below 2^-6 steps are 2^-9 wide.
    assert bool((error <= weight.abs() * 2.0**-4 * 1.001 + factor * 2.0**-10 * 1.001).all())
    assert float(values.float().abs().max()) in (448.0, 0.0)


def test_a_block_scale_belongs_to_its_block():
    weight = torch.ones(256, 256)
    weight[128:, :128] = 8
    _, scale = quantize(weight, strategy="block")
    assert torch.allclose(scale * 448, torch.tensor([[1.0, 1.0], [8.0, 1.0]]))


@pytest.fixture(scope="module")
def folders(benches, tmp_path_factory):
    """By model and kind: the export's folder and numbers."""
    made = {}
    for name, bench in benches.items():
        for kind in ("", "block"):
            folder = tmp_path_factory.mktemp(f"fp8-{name}-{kind}")
            made[name, kind] = (folder, export_fp8(bench.stage, folder, kind).checks)
    return made


@pytest.mark.parametrize("kind", ["", "block"])
def test_measured_numbers(bench, folders, kind):
    folder, checks = folders[bench.name, kind]
    assert checks["matrices_quantized"] == 14, "seven matrices in each of two layers"
    assert checks["left_in_16_bits"] == ["lm_head"]
    assert 0.02 < checks["worst_weight_error"] < 0.03
    assert 0.01 < checks["logits"]["relative_error"] < 0.25
    assert checks["logits"]["mean_kl"] < 0.01
    info = index_folder(folder)[UP]
    assert (info.dtype, info.shape) == ("F8_E4M3", (768, 256))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < sum(path.stat().st_size for path in bench.stage.merged.folder.glob("*.safetensors")) * 0.85


@pytest.mark.parametrize("kind", ["", "block"])
def test_the_configuration_is_one_compressed_tensors_knows(folders, kind):
    from compressed_tensors.quantization import QuantizationConfig

    folder, _ = folders["tiny-qwen3", kind]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config.pop("quant_method") == "compressed-tensors"
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert group.weights.strategy == (kind or "channel")
    assert group.input_activations.dynamic and not group.weights.dynamic


def test_shards_stay_shards(llama, tmp_path):
    source = copy(llama.stage.merged.folder, tmp_path / "merged")
    names = sorted(index_folder(source))
    edit_tensors(source, lambda tensors: tensors, shards=(names[:9], names[9:]))
    layers = linear_layers(source, multiple=16, what="fp8")
    from dropforge.export.fp8_format import quantization_config
    from dropforge.export.quantized_folder import write_quantized

    (tmp_path / "fp8").mkdir()
    write_quantized(
        source, tmp_path / "fp8", layers=layers, stored=("", "_scale"),
        quantize=lambda w: dict(zip(("", "_scale"), quantize(w, strategy="channel"), strict=True)),
        config=quantization_config(strategy="channel", ignore=list(layers.kept)),
    )  # fmt: skip
    assert len(list((tmp_path / "fp8").glob("model-*.safetensors"))) == 2
    verify_quantized(tmp_path / "fp8", source=source, layers=layers, answers=llama.stage.merged.answers, limits=FP8)


def test_matrices_that_do_not_fit_stay_whole_with_those_they_are_fused_with(llama, tmp_path):
    source = copy(llama.stage.merged.folder, tmp_path / "merged")
    layers = linear_layers(source, multiple=256, what="fp8")  # k_proj and v_proj are [128, 256]
    assert {name.rpartition(".")[2] for name in layers.kept} == {"lm_head", "q_proj", "k_proj", "v_proj"}
    with pytest.raises(ExportError) as error:
        linear_layers(source, multiple=512, what="fp8")
    assert error.value.code == "export-quantize-unsupported"


# ------------------------------------------------------------------ sabotage


@pytest.fixture
def damaged(llama, folders, tmp_path):
    return copy(folders["tiny-llama", ""][0], tmp_path / "fp8")


def refused(bench, folder) -> str:
    source = bench.stage.merged.folder
    layers = linear_layers(source, multiple=16, what="fp8")
    with pytest.raises(ExportError) as error:
        verify_quantized(folder, source=source, layers=layers, answers=bench.stage.merged.answers, limits=FP8)
    assert error.value.code == "export-quantize-wrong"
    return f"{error.value.problems[0].what} {error.value.problems[0].why}"


def test_a_scale_of_another_row(llama, damaged):
    edit_tensors(damaged, lambda t: {**t, f"{UP}_scale": t[f"{UP}_scale"].flip(0) * 1.5})
    assert UP in refused(llama, damaged)


def test_one_row_of_noise(llama, damaged):
    def noise(tensors):
        tensors[UP].view(torch.uint8)[7] = 0x30
        return tensors

    edit_tensors(damaged, noise)
    assert UP in refused(llama, damaged)


def test_a_missing_scale(llama, damaged):
    edit_tensors(damaged, lambda t: {name: value for name, value in t.items() if name != f"{UP}_scale"})
    assert "configuration" in refused(llama, damaged)


def test_a_changed_norm(llama, damaged):
    edit_tensors(damaged, lambda t: {**t, "model.norm.weight": t["model.norm.weight"] * 1.01})
    assert "model.norm.weight" in refused(llama, damaged)


def test_weights_that_are_not_quantised(llama, damaged):
    merged = index_folder(llama.stage.merged.folder)
    edit_tensors(damaged, lambda t: {**t, UP: read_tensor(merged[UP], UP)})
    assert "not quantised" in refused(llama, damaged)


def test_a_configuration_that_computes_something_else(llama, damaged):
    edit_json(damaged / "config.json", rms_norm_eps=10.0)
    assert "predicts something else" in refused(llama, damaged)


def test_the_public_entry_places_both_kinds(llama, tmp_path):
    result = type(llama.result)(tmp_path / "result")
    reports = llama.export(("fp8", "fp8:block"), result=result, work=tmp_path / "work")
    assert [(r.kind, r.ok, r.path) for r in reports] == [("fp8", True, "fp8"), ("fp8:block", True, "fp8-block")]
    assert sorted(path.name for path in result.path.iterdir()) == ["fp8", "fp8-block"]
    assert (result.fp8 / "tokenizer.json").is_file()
