"""The committed example data: readable, without repetitions or contradictions, and made by the committed script."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "elements"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("elements_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["elements_build"] = module
    spec.loader.exec_module(module)
    return module


def pairs():
    for line in (FOLDER / "elements.jsonl").read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        yield user["content"], assistant["content"]


def test_questions_are_many_and_appear_once():
    questions = [question for question, _ in pairs()]
    assert len(questions) == len(set(questions)) == 309


def test_known_answers():
    known = {
        "What is the chemical symbol of gold?": "Au",
        "What is the atomic number of oxygen?": "8",
        "Which element has the symbol W?": "tungsten",
        "What is the atomic number of lawrencium?": "103",
    }
    assert {question: answer for question, answer in pairs() if question in known} == known


@pytest.mark.parametrize(
    ("name", "form", "rows"), [("elements.jsonl", "messages", 309), ("elements.csv", "alpaca", 206)]
)
def test_both_files_are_understood(bench, name, form, rows):
    data = bench.prepare(bench.write(name, (FOLDER / name).read_bytes()))
    assert (data.report.format, data.report.rows, data.report.rows_dropped) == (form, rows, 0)
    assert [w for w in data.report.warnings if "to begin with" not in w] == []


def dictionary(path, names, *, last=103):
    """A file like the package's: each element as name, symbol, number."""
    text = "".join(
        f"{name}\nSymbol: {symbol}\nAtomic number: {number}\nA metal.\n\n" for name, symbol, number in names[:last]
    )
    path.write_bytes(
        gzip.compress(("notice\n\n" + text + "unnilquadium\nSymbol: Unq\nAtomic number: 104\n").encode("latin-1"))
    )
    return path


def elements():
    answers = dict(pairs())
    names = [question.split()[-1][:-1] for question in answers if "symbol of" in question]
    return [
        (name, answers[f"What is the chemical symbol of {name}?"], answers[f"What is the atomic number of {name}?"])
        for name in names
    ]


def test_the_script_makes_exactly_the_committed_files(build, tmp_path, capsys):
    source = dictionary(tmp_path / "elements.dict.dz", elements())
    assert build.main([str(source), "--out", str(tmp_path)]) == 0
    for name in ("elements.jsonl", "elements.csv"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    assert "309 rows" in capsys.readouterr().out


def test_the_script_refuses_a_damaged_dictionary(build, tmp_path):
    with pytest.raises(ValueError, match="not all there"):
        build.read_elements(dictionary(tmp_path / "a.dz", elements(), last=102))
    twice = [(name, "Au" if symbol == "Ag" else symbol, number) for name, symbol, number in elements()]
    with pytest.raises(ValueError, match="appears twice"):
        build.read_elements(dictionary(tmp_path / "b.dz", twice))
