"""The command line: its frozen surface, its exit statuses, its output for people and programs."""

from __future__ import annotations

import json

import pytest
from dropforge.cli import build_parser, main
from dropforge.settings import settings

SURFACE = {
    "validate": {"spec", "--data", "--json"},
    "plan": {"spec", "--data", "--json"},
    "submit": {"spec", "--data", "--wait", "--json"},
    "run": {"spec", "--data", "--json"},
    "watch": {"--data", "--json"},
    "status": {"job", "--data", "--json"},
    "logs": {"job", "--data", "--follow", "--json"},
    "cancel": {"job", "--data", "--json"},
    "retry": {"job", "--data", "--json"},
    "release": {"job", "--trust-code", "--data", "--json"},
    "export": {"job", "kinds", "--data", "--json"},
    "chat": {"result", "--prompt", "--image", "--system", "--max-tokens", "--temperature", "--data", "--json"},
    "data": {
        "action",
        "files",
        "--model",
        "--template",
        "--format",
        "--max-length",
        "--png",
        "--colour",
        "--data",
        "--json",
    },  # fmt: skip
    "doctor": {"--data", "--json"},
    "schema": {"--json"},
    "models": {"--data", "--json"},
}
GOOD = "version: 1\nname: n\nmodel: builtin:tiny-llama\ndata: t.jsonl\nexport: [merged]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPFORGE_DATA", str(tmp_path / "data"))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def write(folder, text, name="job.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_commands_and_options_are_what_the_table_says():
    """A new option is a promise: add it here, to the docs (`make docs`) and to the changelog."""
    subparsers = next(a for a in build_parser()._actions if a.choices)
    found = {
        name: {a.option_strings[-1] if a.option_strings else a.dest for a in sub._actions if a.dest != "help"}
        for name, sub in subparsers.choices.items()
    }
    assert found == SURFACE


def test_validate(folder, capsys):
    assert main(["validate", write(folder, GOOD)]) == 0
    assert "is valid" in capsys.readouterr().out
    assert main(["validate", write(folder, GOOD), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resolved"]["train"]["seed"] == 3407


def test_a_bad_spec_ends_with_2_and_says_everything(folder, capsys):
    path = write(folder, GOOD.replace("name: n", "nmae: n"))
    assert main(["validate", path]) == 2
    error = capsys.readouterr().err
    assert "nmae" in error and "did you mean 'name'" in error and "'name' is missing" in error
    assert main(["validate", path, "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert {problem["code"] for problem in problems} == {"spec-unknown-key", "spec-missing-key"}


def test_a_missing_file_ends_with_2(folder, capsys):
    assert main(["plan", str(folder / "nothing.yaml")]) == 2
    assert "spec-unreadable" in capsys.readouterr().err


def test_plan_shows_numbers_and_leaves_the_disk_alone(folder, capsys):
    (folder / "t.jsonl").write_text("{}\n" * 32)
    assert main(["plan", write(folder, GOOD), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["rows"], made["steps"]) == (32, 2)
    assert not (folder / "data").exists()


def test_submit_takes_the_data_beside_the_spec(folder, capsys):
    (folder / "t.jsonl").write_text('{"text": "x"}\n')
    assert main(["submit", write(folder, GOOD), "--json"]) == 0
    dropped = folder / "data" / "inbox" / json.loads(capsys.readouterr().out)["file"]
    assert sorted(path.name for path in dropped.iterdir()) == ["job.yaml", "t.jsonl"]


def test_submit_refuses_a_bad_spec_before_it_is_dropped(folder, capsys):
    assert main(["submit", write(folder, "version: 1\n")]) == 2
    assert [p for p in (folder / "data" / "inbox").iterdir() if not p.name.startswith(".")] == []


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "retry", "chat", "export"])
def test_an_unknown_job_is_bad_input(folder, capsys, command):
    extra = ["merged"] if command == "export" else []
    assert main([command, "nobody", *extra]) == 2
    assert "job-unknown" in capsys.readouterr().err


def test_an_empty_answer_is_said_to_be_one(folder, capsys, monkeypatch):
    (folder / "provenance.json").write_text("{}")
    monkeypatch.setattr("dropforge.chat.answer", lambda result, prompts, **options: ["", "yes"])
    assert main(["chat", str(folder), "--prompt", "one", "--prompt", "two"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "\nyes\n" and "'one': the model ended its answer" in shown.err and "two" not in shown.err


def test_status_of_an_empty_root(folder, capsys):
    assert main(["status"]) == 0
    assert "no jobs yet" in capsys.readouterr().out
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_schema_and_models(folder, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["version", "name", "model", "data", "export"]
    model = folder / "data" / "models" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert main(["models", "--json"]) == 0
    ids = [row["id"] for row in json.loads(capsys.readouterr().out)]
    assert ids == ["builtin:tiny-llama", "builtin:tiny-qwen3", "mine"]


def test_doctor_finds_this_machine_fit_and_names_what_is_missing(folder, capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0, capsys.readouterr()
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert any("torch" in finding["what"] for finding in findings)
    monkeypatch.setenv("DROPFORGE_LLAMA_CPP", str(folder / "nowhere"))
    settings.cache_clear()
    assert main(["doctor"]) == 3
    out = capsys.readouterr().out
    assert "FAULT" in out and "make llama" in out
