"""golden_path.txt is a guide's script for the established API. Its import lines change, and nothing else."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from pathlib import Path

import pytest

ORIGINAL = Path(__file__).with_name("golden_path.txt")
# As in docs/guides/porting.md.
IMPORTS = {
    "from unsloth import ": "from dropforge import ",
    "from unsloth.chat_templates import ": "from dropforge.chat_templates import ",
    "from trl import ": "from dropforge.trainers import ",
}


def ported() -> str:
    text = ORIGINAL.read_text(encoding="utf-8")
    for old, new in IMPORTS.items():
        text = text.replace(old, new)
    return text


def test_only_import_lines_change():
    pairs = zip(ORIGINAL.read_text().splitlines(), ported().splitlines(), strict=True)
    changed = [old for old, new in pairs if old != new]
    assert len(changed) == 4 and all(line.startswith("from ") and " import " in line for line in changed)
    assert "unsloth import" not in ported() and "from trl" not in ported()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of bitsandbytes, on a machine without a GPU
def test_the_script_trains(rows, tmp_path, checkpoint):
    """The hub's names lead to local folders: a tiny model under models/, and rows beside the script."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.1,
    )  # fmt: skip
    shutil.copytree(checkpoint("model", config), tmp_path / "data" / "models" / "unsloth" / "Llama-3.1-8B")
    folder = tmp_path / "mlabonne" / "FineTome-100k"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = tmp_path / "script.py"
    script.write_text(ported())

    names = runpy.run_path(str(script))

    trainer, model, tokenizer = names["trainer"], names["model"], names["tokenizer"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == trainer.state.global_step == 60 and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    assert trainer.args.max_length == 2048 and trainer.args.optim == "adamw_8bit"
    answers = [[label for label in row["labels"] if label != -100] for row in trainer.train_dataset]
    assert {tokenizer.decode(answer).partition(".")[0] for answer in answers} == {
        f"It is {city}" for city in ("Paris", "Rome", "Madrid", "Oslo", "Tokyo", "Lima")
    }
    assert model.is_loaded_in_4bit and not model.training and tokenizer.padding_side == "left"
    assert all(p.dtype.itemsize == 4 and "lora_" in name for name, p in model.named_parameters() if p.requires_grad)
