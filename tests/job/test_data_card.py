"""A job over a weighted mixture learns from answers alone, and its data card says so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dropforge.cli import main
from dropforge.settings import settings

ELEMENTS = Path(__file__).resolve().parents[2] / "examples" / "elements"


def test_a_job_over_a_mix_leaves_a_card_of_what_was_learnt(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DROPFORGE_DATA", str(tmp_path / "data"))
    settings.cache_clear()
    for name in ("elements.csv", "elements.jsonl"):
        shutil.copyfile(ELEMENTS / name, tmp_path / name)
    spec = (ELEMENTS / "mix.yaml").read_text(encoding="utf-8").replace("num_train_epochs: 1", "max_steps: 2")
    (tmp_path / "mix.yaml").write_text(spec, encoding="utf-8")
    try:
        assert main(["run", str(tmp_path / "mix.yaml")]) == 0
    finally:
        settings.cache_clear()
    card = next((tmp_path / "data" / "results").rglob("DATA_CARD.md")).read_text(encoding="utf-8")
    assert re.search(r"elements\.csv: 206 rows, weight 2: 39\d rows, 57\.\d % of the training", card)
    assert "elements.jsonl: 309 rows, weight 1: 29" in card and "evaluation  26" in card
    learnt = re.findall(r"\[\[(.*?)\]\]", card.partition("--- 1")[2])
    assert learnt[0] == "H<|im_end|>" and len(learnt) == 3
    assert all(text.endswith("<|im_end|>") and "element" not in text for text in learnt)
    share = float(re.search(r"tokens, ([\d.]+) % of them learnt", card)[1])
    assert 0 < share < 15
