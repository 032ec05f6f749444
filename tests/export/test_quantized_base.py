"""Base models whose own files are quantised: merged onto the original when it is at hand, else onto dequantised weights.

That the dequantised weights are what a runtime computes with is checked against transformers, which loads the quantised
folder in its own way.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings

import pytest
import torch
from dropforge.errors import ExportError
from dropforge.export import export_all
from dropforge.export.base_weights import _plain_name, base_weights, original_folders
from dropforge.export.export_fp8 import MULTIPLE
from dropforge.export.export_merged_4bit import BLOCK, STORED, quantization_config
from dropforge.export.export_merged_4bit import quantize as quantize_nf4
from dropforge.export.fp8_format import quantization_config as fp8_config
from dropforge.export.fp8_format import quantize as quantize_fp8
from dropforge.export.precheck import precheck
from dropforge.export.quantized_base import quantized_base
from dropforge.export.quantized_folder import linear_layers, write_quantized
from dropforge.export.reference import logprobs, quiet_libraries
from dropforge.export.tensor_reader import TensorReader
from dropforge.paths import DataRoot, ResultFolder
from export_harness import change_tensor, copy, edit_json

ROWS, POSITIONS = [[5, 6, 7, 8, 9, 10]], [[0, 3, 5]]
FORMATS = ("nf4", "fp8 rows", "fp8 blocks", "deepseek blocks")


def quantized_copy(source, target, kind):
    """`source` (float16 or bfloat16) in one of FORMATS, as its own libraries write it."""
    target.mkdir()
    if kind == "nf4":
        layers = linear_layers(source, multiple=BLOCK, what=kind)
        config = quantization_config(compute="float16", skip=list(layers.kept))
        write_quantized(source, target, layers=layers, quantize=quantize_nf4, stored=STORED, config=config)
        return target
    strategy = "channel" if kind == "fp8 rows" else "block"
    layers = linear_layers(source, multiple=MULTIPLE[strategy], what=kind)
    ending, config = "_scale", fp8_config(strategy=strategy, ignore=list(layers.kept))
    if kind == "deepseek blocks":
        ending = "_scale_inv"
        config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}

    def parts(weight):
        values, scale = quantize_fp8(weight, strategy=strategy)
        return {"": values, ending: scale}

    write_quantized(source, target, layers=layers, quantize=parts, stored=("", ending), config=config)
    return target


@pytest.fixture(scope="module")
def half(benches, tmp_path_factory):
    """tiny-llama in float16, as a base with a 16-bit original would be."""
    bench = benches["tiny-llama"]
    folder = copy(bench.base, tmp_path_factory.mktemp("half") / "base")
    tensors = {name: TensorReader(folder).whole(name).half() for name in TensorReader(folder).names}
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="float16")
    return folder


def transformers_view(folder):
    """Log-probabilities of the quantised folder as transformers loads it."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
        return logprobs(model.eval(), ROWS, POSITIONS)[0]


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantised_weights_are_what_transformers_computes_with(half, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    base = quantized_copy(half, tmp_path / "q", kind)
    said = []
    found = base_weights(base, originals=(), work=tmp_path / "work", log=said.append)
    assert found.note["weights"] == "dequantised" and found.note["matrices"] == 14 and "not at hand" in said[0]
    config = json.loads((found.folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float16"
    assert (found.folder / "tokenizer.json").exists()
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32).eval()
    mine, theirs = logprobs(model, ROWS, POSITIONS)[0], transformers_view(base)
    original = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).eval()
    rounding = abs(logprobs(original, ROWS, POSITIONS)[0] - mine).max()
    # bitsandbytes computes in float16 here, compressed-tensors rounds activations to FP8 too
    assert abs(mine - theirs).max() < (0.03 if kind == "nf4" else 0.6 * rounding + 0.05)
    assert rounding > 0.02, "the rounding shows, so the weights are the quantised ones"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_matrix_is_within_its_format(half, kind, tmp_path):
    base = quantized_base(quantized_copy(half, tmp_path / "q", kind))
    truth = TensorReader(half)
    assert base.shapes == {name: truth.shape(name) for name in truth.names}
    for name in truth.names:
        error = float((base.tensor(name).float() - truth.whole(name).float()).norm() / truth.whole(name).float().norm())
        assert error == 0 if name not in base.matrices else 0.005 < error < (0.12 if kind == "nf4" else 0.035), name


def test_the_original_is_used_when_it_is_at_hand(half, tmp_path):
    base = quantized_copy(half, tmp_path / "q", "nf4")
    other = copy(half, tmp_path / "other")
    change_tensor(other, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.flip(0))
    said = []
    candidates = (tmp_path / "nothing", other, half)
    found = base_weights(base, originals=candidates, work=tmp_path / "work", log=said.append)
    assert found.folder == half and found.note["weights"] == "original" and not (tmp_path / "work").exists()
    assert 0.05 < found.note["worst_distance"] < 0.15
    found = base_weights(base, originals=candidates[:2], work=tmp_path / "work", log=said.append)
    assert found.note["weights"] == "dequantised", "a model with another matrix is not the original"


def test_another_embedding_is_another_model(half, tmp_path):
    base = quantized_copy(half, tmp_path / "q", "fp8 rows")
    other = copy(half, tmp_path / "other")
    change_tensor(other, "model.embed_tokens.weight", lambda tensor: tensor * 1.02)
    assert base_weights(base, originals=(other,), work=tmp_path / "work", log=str).note["weights"] == "dequantised"


def test_where_an_original_is_looked_for(half, tmp_path):
    names = {
        "org/Model-1B-bnb-4bit": "org/Model-1B", "Model-unsloth-bnb-4bit": "Model", "a/B-FP8-dynamic": "a/B", "a/B": "a/B",
    }  # fmt: skip
    assert {name: _plain_name(name) for name in names} == names
    root = DataRoot(tmp_path)
    for name in ("Model-1B", "elsewhere"):
        shutil.copytree(half, tmp_path / "models" / name)
    base = quantized_copy(half, tmp_path / "models" / "Model-1B-bnb-4bit", "nf4")
    assert original_folders("Model-1B-bnb-4bit", base=base, root=root) == (tmp_path / "models" / "Model-1B",)
    (base / "README.md").write_text("---\nbase_model: some/elsewhere\n---\n")
    found = original_folders("Model-1B-bnb-4bit", base=base, root=root)
    assert set(found) == {tmp_path / "models" / "Model-1B", tmp_path / "models" / "elsewhere"}
    assert original_folders("Model-1B", base=half, root=root) == ()


def test_exports_of_a_quantised_base_say_so(llama, half, llama_cpp, tmp_path):
    base = quantized_copy(half, tmp_path / "q", "nf4")
    result = ResultFolder(tmp_path / "result")
    kinds = ("adapter", "merged", "lora_gguf")
    precheck(kinds, base=base)
    request = llama.request(kinds, base_path=base, result=result, work=tmp_path / "work")
    reports = export_all(request, log=llama.log.append)
    assert [(report.kind, report.problem) for report in reports if not report.ok] == []
    assert all(report.checks["base_weights"]["weights"] == "dequantised" for report in reports)
    # the same with the original at hand is another model
    exact = ResultFolder(tmp_path / "exact")
    request = llama.request(("merged",), base_path=base, originals=(half,), result=exact, work=tmp_path / "work2")
    (report,) = export_all(request, log=llama.log.append)
    assert report.ok and report.checks["base_weights"]["weights"] == "original"
    name = "model.layers.0.mlp.up_proj.weight"
    one, other = TensorReader(result.merged).whole(name).float(), TensorReader(exact.merged).whole(name).float()
    assert 0.02 < float((one - other).norm() / other.norm()) < 0.15


def test_formats_that_are_not_read_are_refused_with_their_name(half, tmp_path):
    base = quantized_copy(half, tmp_path / "q", "fp8 rows")
    config = json.loads((base / "config.json").read_text())["quantization_config"]
    edit_json(base / "config.json", quantization_config={**config, "quant_method": "gptq"})
    with pytest.raises(ExportError, match="gptq"):
        precheck(("merged",), base=base)
    edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ExportError) as error:
        quantized_base(base)
    assert error.value.code == "export-base-quantized" and "F8_E4M3" in error.value.problems[0].why
