"""Models too large to hold are checked in pieces: the same numbers, the same refusals, a bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from dropforge.errors import ExportError
from dropforge.export import reference
from dropforge.export.calibration import input_statistics
from dropforge.export.export_fp8 import export_fp8
from dropforge.export.export_merged_4bit import export_merged_4bit
from dropforge.export.merge import merge
from dropforge.export.quantized_folder import linear_layers
from dropforge.export.reference import logprobs, trained_model
from dropforge.export.samples import TrainingRow
from dropforge.export.streamed_model import CannotStream, streamed_model
from dropforge.export.tensor_reader import TensorReader
from dropforge.export.verify_merged import verify_merged
from dropforge.export.verify_quantized import FP8, verify_quantized
from export_harness import change_tensor, edit_tensors, make_adapter

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
POSITIONS = [[0, 3, 5], [2]]
ADAPTERS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "trained embedding and head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"target_modules": ["up_proj", "lm_head"]},
}


@pytest.fixture
def pieces(monkeypatch):
    """Every model counts as too large."""
    monkeypatch.setattr(reference, "WHOLE_BYTES", 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "kind"), [("tiny-llama", "dora"), *(("tiny-qwen3", kind) for kind in ADAPTERS)])
def test_the_same_numbers_as_in_memory(benches, name, kind, tmp_path, monkeypatch):
    """tiny-qwen3 ties its head to its embedding."""
    bench = benches[name]
    make_adapter(bench.base, tmp_path / "adapter", **ADAPTERS[kind])
    (tmp_path / "merged").mkdir()
    merge(bench.base, tmp_path / "adapter", tmp_path / "merged")
    checks, rows = [], []
    for limit in (2**40, 0):
        monkeypatch.setattr(reference, "WHOLE_BYTES", limit)
        with trained_model(bench.base, tmp_path / "adapter", None) as model:
            assert reference.is_streamed(model) == (limit == 0)
            rows.append(logprobs(model, ROWS, POSITIONS))
        checks.append(
            verify_merged(
                tmp_path / "merged", base=bench.base, adapter=tmp_path / "adapter", full=None, prompts=ROWS, stop=None
            ).checks
        )
    whole, pieces = checks
    assert [found.shape[0] for found in rows[1]] == [3, 1]
    for one, other in zip(*rows, strict=True):
        assert abs(one - other).max() < 1e-4
    assert (whole.pop("checked_in_pieces"), pieces.pop("checked_in_pieces")) == (False, True)
    assert pieces["tensors_compared"] >= whole["tensors_compared"] > 10
    assert pieces["tensors"] == whole["tensors"]
    assert pieces["logits"]["relative_error"] == pytest.approx(whole["logits"]["relative_error"], rel=0.05)


@pytest.fixture
def merged(llama, tmp_path):
    (tmp_path / "merged").mkdir()
    merge(llama.base, llama.adapter, tmp_path / "merged")
    return tmp_path / "merged"


def refused(bench, folder) -> str:
    with pytest.raises(ExportError) as error:
        verify_merged(folder, base=bench.base, adapter=bench.adapter, full=None, prompts=ROWS, stop=None)
    assert error.value.code == "export-merge-wrong"
    return f"{error.value.problems[0].what} {error.value.problems[0].why}"


def test_one_value_too_far_off(llama, merged, pieces):
    def nudge(tensor):
        tensor[3, 5] *= 1.02
        return tensor

    change_tensor(merged, "model.layers.0.mlp.down_proj.weight", nudge)
    assert "model.layers.0.mlp.down_proj.weight differs" in refused(llama, merged)


def test_a_matrix_that_was_not_merged(llama, merged, pieces):
    name = "model.layers.1.self_attn.v_proj.weight"
    change_tensor(merged, name, lambda tensor: TensorReader(llama.base).whole(name).to(tensor.dtype))
    assert f"{name} differs" in refused(llama, merged)


def test_a_tensor_nobody_asked_for(llama, merged, pieces):
    edit_tensors(merged, lambda tensors: {**tensors, "model.extra.weight": tensors["model.norm.weight"].clone()})
    assert "model.extra.weight" in refused(llama, merged)


def test_a_missing_tensor_cannot_be_streamed(llama, merged):
    edit_tensors(merged, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k})
    with pytest.raises(CannotStream, match="layers.1.mlp.up_proj"), streamed_model(merged):
        pass


def test_pieces_of_a_matrix(llama, monkeypatch):
    """A head of 512 rows in pieces of 50: the last one is shorter."""
    from dropforge.export import streamed_model as module

    with streamed_model(llama.base) as model:
        whole = logprobs(model, ROWS, POSITIONS)
    monkeypatch.setattr(module, "PIECE_BYTES", 50 * 4 * 256)
    with streamed_model(llama.base) as model:
        pieces = logprobs(model, ROWS, POSITIONS)
    for one, other in zip(whole, pieces, strict=True):
        assert abs(one - other).max() < 1e-5


@pytest.mark.parametrize("kind", ["", "block", "nf4"])
def test_quantised_folders_in_pieces(llama, kind, tmp_path, monkeypatch):
    """The same numbers as with the library that loads the whole folder."""
    checks = []
    for limit in (2**40, 0):
        monkeypatch.setattr(reference, "WHOLE_BYTES", limit)
        folder = tmp_path / f"{limit}"
        folder.mkdir()
        made = export_merged_4bit(llama.stage, folder) if kind == "nf4" else export_fp8(llama.stage, folder, kind)
        checks.append(made.checks)
    whole, pieces = checks
    assert (whole.pop("checked_in_pieces"), pieces.pop("checked_in_pieces")) == (False, True)
    for name in ("relative_error", "mean_kl"):
        assert pieces["logits"][name] == pytest.approx(whole["logits"][name], rel=0.05, abs=1e-4)
    assert pieces["worst_weight_error"] == pytest.approx(whole["worst_weight_error"], rel=0.02)
    assert pieces["tensors_kept"] == whole["tensors_kept"]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_scales_do_not_pass_in_pieces(llama, damage, tmp_path, pieces):
    export_fp8(llama.stage, tmp_path, "")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    if damage == "missing":
        edit_tensors(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    else:
        edit_tensors(tmp_path, lambda tensors: {**tensors, name: tensors[name] * 1.1})
    source = llama.stage.merged.folder
    with pytest.raises(ExportError) as error:
        verify_quantized(
            tmp_path, source=source, layers=linear_layers(source, multiple=16, what="fp8"),
            answers=llama.stage.merged.answers, limits=FP8,
        )  # fmt: skip
    assert error.value.code == "export-quantize-wrong"


def test_calibration_in_pieces(llama, monkeypatch):
    rows = tuple(TrainingRow(ids=tuple(range(start, start + length)), prompt=0) for start, length in ((5, 9), (40, 30)))
    found = []
    for limit in (2**40, 0):
        monkeypatch.setattr(reference, "WHOLE_BYTES", limit)
        found.append(input_statistics(llama.base, rows))
    whole, pieces = found
    assert whole.tokens == pieces.tokens == 39
    assert set(whole.squares) == set(pieces.squares) and "lm_head" in whole.squares
    for name, value in whole.squares.items():
        assert torch.allclose(value, pieces.squares[name], rtol=1e-3)
        assert whole.largest[name] == pytest.approx(pieces.largest[name], rel=1e-3)


MEMORY = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
from dropforge.export import reference
from dropforge.export.merge import merge
from dropforge.export.verify_merged import verify_merged
from dropforge.export.verify_quantized import FP8, verify_quantized

def used():
    # Not getrusage: what a process was before exec, a copy of the tests' own, counts there.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

def make(folder, layers):
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=1000,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    from dropforge.export.safetensors_stream import write_file
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", shapes, dtype=torch.bfloat16, tensor=lambda n: torch.randn(shapes[n]) * 0.02)
    config.save_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4)).peft_config["default"].save_pretrained(
        folder / "adapter"
    )
    pairs = {}
    for layer in range(layers):
        for part, out, inside in (("self_attn.q_proj", 512, 512), ("mlp.down_proj", 512, 2048)):
            start = f"base_model.model.model.layers.{layer}.{part}"
            pairs[f"{start}.lora_A.weight"], pairs[f"{start}.lora_B.weight"] = torch.randn(4, inside), torch.randn(out, 4)
    from safetensors.torch import save_file
    save_file(pairs, folder / "adapter" / "adapter_model.safetensors")
    return sum(torch.Size(shape).numel() for shape in shapes.values())

def check(folder, limit):
    reference.WHOLE_BYTES = limit
    if limit == 0:
        (folder / "merged").mkdir()
        merge(folder, folder / "adapter", folder / "merged")
    return verify_merged(
        folder / "merged", base=folder, adapter=folder / "adapter", full=None, prompts=[[1, 2, 3]], stop=None
    ).checks

root = Path(sys.argv[1])
make(root / "small", 2)
numbers = make(root / "large", 28)
check(root / "small", 0)
marks = [used()]
assert check(root / "large", 0)["checked_in_pieces"]
marks.append(used())
assert not check(root / "large", 2**40)["checked_in_pieces"]
marks.append(used())
print(json.dumps({"model": numbers * 4, "pieces": marks[1] - marks[0], "whole": marks[2] - marks[1]}))
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """2 layers, then 28: merge and verification in pieces need hardly more; held whole, the model's size shows."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] > 470e6
    assert found["pieces"] < 0.15 * found["model"], found
    assert found["whole"] > 0.5 * found["model"], found


def test_the_reader_reads_rows_and_says_when_a_file_is_short(llama, tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3), "b": torch.tensor(7.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert reader.names == ["a", "b"] and reader.label("a") == "BF16"
    assert reader.rows("a", 1, 3).equal(tensors["a"][1:3])
    assert reader.whole("b").equal(tensors["b"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError) as error:
        reader.whole("a"), reader.whole("b")
    assert error.value.code == "export-weights-broken"
