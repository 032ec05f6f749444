"""The report: numbers that can be checked by hand, a picture that is one, and the command as a newcomer uses it."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from dropforge.cli import main
from dropforge.data.languages import language
from dropforge.data.lengths import best_fit, histogram, packing, suggested_length
from dropforge.data.report import report_of
from dropforge.data.report_png import draw, png
from dropforge.data.report_text import data_card, report_text
from dropforge.settings import settings

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(200)]


def test_histogram_counts_every_row():
    lengths = np.asarray([5, 5, 6, 50, 120])
    bins = histogram(lengths)
    assert sum(count for _, _, count in bins) == 5 and bins[0][0] == 5 and bins[-1][1] == 120
    assert all(high + 1 == following for (_, high, _), (following, _, _) in zip(bins, bins[1:], strict=False))
    assert histogram(np.asarray([7])) == [(7, 7, 1)] and histogram(np.asarray([])) == []


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [([4, 4, 2, 2, 2, 2], 8, 2), ([5, 5, 5], 8, 3), ([8, 8], 8, 2), ([1], 8, 1), ([6, 5, 3, 2], 8, 2)],
)
def test_best_fit(lengths, budget, rows):
    assert best_fit(lengths, budget=budget) == rows


def test_packing_and_suggested_length():
    lengths = np.full(1000, 100)
    first = packing(lengths)[0]
    assert (first.budget, first.rows) == (512, 200)
    assert first.efficiency == pytest.approx(500 / 512) and first.alone == pytest.approx(100 / 512)
    assert suggested_length(np.asarray([10] * 99 + [5000])) == 64
    assert suggested_length(np.asarray([60])) == 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the capital of the country?", "en"),
        ("Wie heißt die Hauptstadt und was ist das?", "de"),
        ("Quelle est la capitale de la France et des îles ?", "fr"),
        ("¿Cuál es la capital del Perú y qué más?", "es"),
        ("この文は日本語です", "ja"),
        ("中国的首都是哪里", "zh"),
        ("Какая столица России?", "ru"),
        ("12345", "?"),
    ],
)
def test_languages(text, expected):
    assert language(text) == expected


def test_the_numbers_of_a_report(bench):
    rows = [*ROWS, {"prompt": "x", "completion": ""}, {"prompt": "a\n" * 400, "completion": "long"}]
    data = bench.prepare({"train": bench.jsonl("a.jsonl", rows), "system": "Be brief."}, length=64)
    report = data.report
    assert report.roles == {"system": 201, "user": 201, "assistant": 201}
    assert sum(count for _, _, count in report.histogram) == report.rows == 200
    assert report.dropped_reasons == {
        "an answer is empty": 1,
        "no answer begins within the first 64 tokens (model.max_seq_length)": 1,
    }
    assert report.mean_length == pytest.approx(np.mean([len(row["input_ids"]) for row in data.train]))
    assert report_of(json.loads(json.dumps(asdict(report)))).packing == report.packing
    learnt = "".join(text for text, is_learnt in report.examples[0] if is_learnt)
    assert learnt == "answer 0<|im_end|>"


def test_the_text_says_it_all(bench):
    a, b = (
        bench.jsonl("a.jsonl", ROWS[:100]),
        bench.jsonl("b.jsonl", [*ROWS[100:110], {"prompt": "x", "completion": ""}]),
    )
    report = bench.prepare([{"path": a}, {"path": b, "weight": 3}]).report
    text = report_text(report, tokenizer="tiny")
    for expected in (
        "a.jsonl: 100 rows", "because columns 'prompt' and 'completion'", "dropped     1: an answer is empty",
        "for example b.jsonl:11", "b.jsonl: 10 rows, weight 3: 30 rows, 23.1 % of the training", "[[answer 0<|im_end|>]]",
        "suggested model.max_seq_length: 64", "% full", "turns       user 110, assistant 110", "counted with tiny",
    ):  # fmt: skip
        assert expected in text
    assert "\x1b[30;42manswer 0<|im_end|>\x1b[0m" in report_text(report, tokenizer="tiny", colour=True)
    assert data_card(report, tokenizer="tiny").startswith("# Data card\n") and "\x1b" not in data_card(
        report, tokenizer="t"
    )


def test_the_first_line_sums_up_and_long_examples_say_that_they_go_on(bench):
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "word " * 900}]
    report = bench.prepare(bench.jsonl("a.jsonl", rows), length=2048).report
    text = report_text(report, tokenizer="tiny")
    assert text.startswith("1 row to train on, 1 of 2 dropped; 2 warnings at the end.\n")
    assert "]] [...]" in text and "a.jsonl: 2 rows" in text


def test_languages_that_alternate_by_row_are_both_seen(bench):
    texts = ("Was ist das und wie geht es?", "What is this and how is it?")
    rows = [{"prompt": texts[i % 16 > 0], "completion": str(i)} for i in range(3000)]
    shares = bench.prepare(bench.jsonl("a.jsonl", rows)).report.languages
    assert shares["de"] == pytest.approx(1 / 16, abs=0.03) and shares["en"] == pytest.approx(15 / 16, abs=0.03)


def test_the_picture_is_a_png_with_bars():
    image = draw([(1, 10, 5), (11, 20, 10), (21, 30, 0)])
    content = png(image)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    start = content.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", content[start - 8 : start - 4])
    pixels = np.frombuffer(zlib.decompress(content[start : start + length]), dtype=np.uint8).reshape(height, -1)[:, 1:]
    assert (pixels.reshape(height, width, 3) == image).all()
    blue = (image == (46, 110, 180)).all(axis=2).sum(axis=0)
    assert blue.max() == 2 * blue[blue > 0].min()  # the second bar is twice as tall


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPFORGE_DATA", str(tmp_path / "data"))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def test_the_command_on_csv_excel_and_chat(folder, capsys):
    csv, excel, chat = folder / "rivers.csv", folder / "tickets.xlsx", folder / "chat.jsonl"
    csv.write_text(
        "Question,Answer\n" + "".join(f"Which river flows through town {i}?,River {i}\n" for i in range(120))
    )
    pd.DataFrame([{"instruction": f"Ticket {i}", "output": "closed"} for i in range(5)]).to_excel(excel, index=False)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    chat.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(3)))
    for path, form in ((csv, "prompt_completion"), (excel, "alpaca"), (chat, "messages")):
        assert main(["data", "report", str(path)]) == 0
        out = capsys.readouterr().out
        assert f"format {form}" in out and "[[" in out and "LENGTHS" in out
    assert main(["data", "report", str(csv), "--json", "--png", str(folder / "h.png"), "--template", "llama-3.1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 120 and (folder / "h.png").read_bytes().startswith(b"\x89PNG")
    assert "Cutting Knowledge Date" in report["examples"][0][0][0]


def test_the_command_on_a_job_over_a_mix(folder, capsys):
    (folder / "a.csv").write_text("prompt,completion\n" + "".join(f"question {i},answer {i}\n" for i in range(20)))
    (folder / "b.jsonl").write_text(json.dumps({"text": "The sea was calm."}) + "\n")
    (folder / "job.yaml").write_text(
        "version: 1\nname: mix\nmodel: builtin:tiny-llama\n"
        "data:\n  train:\n    - {path: a.csv, weight: 2}\n    - b.jsonl\nexport: [adapter]\n"
    )
    assert main(["data", "report", str(folder / "job.yaml")]) == 0
    assert "a.csv: 20 rows, weight 2: 40 rows" in capsys.readouterr().out


def test_the_command_on_preferences_and_on_nothing(folder, capsys):
    path = folder / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert main(["data", "report", str(path)]) == 0
    assert "two answers to compare" in capsys.readouterr().out
    assert main(["data", "report", str(folder / "missing.csv")]) == 2
    assert "data-missing" in capsys.readouterr().err
