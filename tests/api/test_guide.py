"""docs/guides/python-api.md: every Python block runs, in the order of the page, and the texts it quotes are the code's."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from dropforge.errors import CommandError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "python-api.md"


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*bitsandbytes.*:UserWarning")
def test_every_block_runs(tmp_path, capsys, caplog):
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks("python")))
    runpy.run_path(str(script))
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert len(list((tmp_path / "outputs").glob("checkpoint-*"))) == 2
    printed = capsys.readouterr().out
    for part in ("model: builtin:tiny-llama", "weights: ", "trained: ", "kernels: ", "repair: double begin token"):
        assert part in printed, part
    assert "the model has this adapter already, and it trains on" in caplog.text


def test_the_error_it_shows_is_the_one_that_comes():
    from dropforge import FastLanguageModel

    (shown,) = blocks("text")
    with pytest.raises(CommandError) as caught:
        FastLanguageModel.from_pretrained("builtin:tiny-llama", max_seq_length=8192)
    assert f"CommandError: {caught.value}" == shown.strip()


EXAMPLES = PAGE.parents[2] / "examples" / "python"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_script_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--max-steps", "2", "--output", str(tmp_path / "result")])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "'loss': " in capsys.readouterr().out
    assert any((tmp_path / "result").iterdir())
