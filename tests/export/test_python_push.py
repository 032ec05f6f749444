"""push_to_hub_* of models loaded by FastLanguageModel, against the stand-in."""

from __future__ import annotations

import warnings

import pytest
from dropforge.errors import CommandError, ExportError
from hub_stand_in import TOKEN, StandIn, only_loopback

# huggingface_hub's own way to call httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with only_loopback(monkeypatch), StandIn().running() as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture(scope="module")
def model():
    from dropforge import FastLanguageModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = FastLanguageModel.from_pretrained("builtin:tiny-llama", max_seq_length=128, load_in_4bit=False)
        return FastLanguageModel.get_peft_model(model, r=4)


def test_merged(model, hub):
    (done,) = model.push_to_hub_merged("stand-in/mine", save_method="merged_16bit", token=TOKEN, private=True)
    assert done["repo"] == "stand-in/mine" and hub.repos["stand-in/mine"]["private"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(
        hub.repos["stand-in/mine"]["files"]
    )
    asked = len(hub.requests)
    (dry,) = model.push_to_hub_merged("stand-in/mine", save_method="fp8", token=TOKEN, dry_run=True)
    assert dry["dry_run"] and dry["kind"] == "fp8" and len(hub.requests) == asked
    with pytest.raises(CommandError, match="save_method"):
        model.push_to_hub_merged("stand-in/mine", save_method="merged_2bit", token=TOKEN)


@pytest.mark.slow
def test_gguf(model, hub, llama_cpp):
    (done,) = model.push_to_hub_gguf("stand-in/mine-GGUF", quantization_method="q8_0", token=TOKEN)
    assert done["files"] == ["Modelfile", "mine-gguf-Q8_0.gguf"]
    files = hub.repos["stand-in/mine-GGUF"]["files"]
    assert files["mine-gguf-Q8_0.gguf"][:4] == b"GGUF"
    assert files["Modelfile"].startswith(b"FROM ./mine-gguf-Q8_0.gguf\n")


def test_a_bad_importance_matrix_is_refused_before_anything_is_written(model, tmp_path):
    (tmp_path / "notes.txt").write_text("no importance matrix")
    with pytest.raises(ExportError, match="no importance matrix"):
        model.save_pretrained_gguf(tmp_path / "out", imatrix_file=tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
