"""The Python API is tested offline, on a CPU, with a builtin model and a scratch data root."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # As in tests/kernels/conftest.py: must be set before the first import of dropforge_kernels.ops in this process.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    from dropforge.settings import settings

    monkeypatch.setenv("DROPFORGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def rows():
    """ShareGPT conversations."""
    facts = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Japan": "Tokyo", "Peru": "Lima"}
    return [
        {
            "conversations": [
                {"from": "human", "value": f"Capital of {country}?"},
                {"from": "gpt", "value": f"It is {city}."},
            ]
        }
        for country, city in facts.items()
    ]


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a tiny random model of any config, with the tokenizer of builtin:tiny-llama; returns its folder."""
    import transformers
    from dropforge.models.source import resolve_model
    from dropforge.paths import DataRoot
    from dropforge.spec import ModelSpec

    def make(name, config, *, auto="AutoModelForCausalLM", change=None):
        source = resolve_model(ModelSpec(id="builtin:tiny-llama"), root=DataRoot(tmp_path / "data"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
        text = config.get_text_config()
        text.vocab_size = len(tokenizer)
        text.pad_token_id = tokenizer.pad_token_id
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config)
        if change is not None:
            with torch.no_grad():
                change(model, tokenizer)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make
