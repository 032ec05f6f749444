"""A merged folder that is not the trained model must not pass, however little of it is wrong."""

from __future__ import annotations

import pytest
from dropforge.errors import ExportError
from dropforge.export.merge import merge
from dropforge.export.verify_merged import verify_merged
from export_harness import change_tensor, copy, edit_json

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12]]


@pytest.fixture
def folder(llama, tmp_path):
    (tmp_path / "merged").mkdir()
    merge(llama.base, llama.adapter, tmp_path / "merged")
    return tmp_path / "merged"


def verify(bench, folder):
    return verify_merged(folder, base=bench.base, adapter=bench.adapter, full=None, prompts=PROMPTS, stop=None)


def fails(bench, folder) -> ExportError:
    with pytest.raises(ExportError) as error:
        verify(bench, folder)
    assert error.value.code == "export-merge-wrong"
    return error.value


def test_the_untouched_folder_passes(llama, folder):
    assert verify(llama, folder).checks["tensors_compared"] > 20


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_one_changed_value_in_one_tensor(llama, folder, name):
    def nudge(tensor):
        flat = tensor.view(-1)
        flat[17] = flat[17] * 1.01 + 1e-3
        return tensor

    change_tensor(folder, name, nudge)
    assert name in fails(llama, folder).problems[0].what


def test_the_base_weights_instead_of_merged_ones(llama, folder, tmp_path):
    (tmp_path / "base-only").mkdir()
    merge(llama.base, None, tmp_path / "base-only")
    fails(llama, tmp_path / "base-only")


def test_a_missing_tensor(llama, folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    fails(llama, folder)


def test_another_shape(llama, folder):
    change_tensor(folder, "lm_head.weight", lambda t: t[:-1])
    fails(llama, folder)


def test_thirty_two_bits(llama, folder):
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    fails(llama, folder)


def test_a_configuration_that_computes_something_else(llama, folder):
    edit_json(folder / "config.json", rms_norm_eps=0.1)
    assert "relative error" in fails(llama, folder).problems[0].why


def test_not_a_number(llama, folder):
    change_tensor(folder, "model.norm.weight", lambda t: t * float("nan"))
    fails(llama, folder)


def test_a_truncated_file(llama, folder):
    path = copy(folder, folder.parent / "cut") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExportError) as error:
        verify(llama, path.parent)
    assert error.value.code == "export-weights-broken"
