"""Data sets of the hub by id, revision and split expression, read from a stand-in of its HTTP API as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "rivers/questions"


def rows(word, count=20):
    return "".join(
        json.dumps({"question": f"Which {word} {i}?", "answer": f"The {word} {i}."}) + "\n" for i in range(count)
    ).encode()


@pytest.fixture(scope="module")
def hub_data():
    import importlib.util

    spec = importlib.util.spec_from_file_location("hub_data", Path(__file__).with_name("hub_data.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hub(hub_data):
    served = hub_data.DataHub(
        NAME,
        {"main": {"train.jsonl": rows("river"), "test.jsonl": rows("sea", 5)}, "v1": {"train.jsonl": rows("brook")}},
    )
    with served.running() as endpoint:
        served.endpoint = endpoint
        yield served


def report(hub, folder, *, environment=None, **source):
    """`dropforge data report` of a job over the source, in a process that knows no other hub."""
    spec = {
        "version": 1, "name": "hub", "model": "builtin:tiny-llama", "export": ["adapter"],
        "data": {"train": [{"path": NAME, **source}]},
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(spec))
    env = {
        "PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.endpoint,
        "DROPFORGE_DATA": str(folder / "root"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "dropforge", "data", "report", str(folder / "job.yaml"), "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=env | (environment or {}), timeout=120)


def test_revision_and_split_are_what_is_read(hub, tmp_path):
    done = report(hub, tmp_path, revision="v1", split="train[10%:20%]")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["rows"] == 2 and told["files"][0]["path"] == f"{NAME} (train[10%:20%])"
    assert "Which brook 2?" in told["examples"][0][0][0]
    assert not any("test.jsonl" in path for path in hub.requests)


@pytest.mark.slow
def test_the_default_is_the_train_split_of_main(hub, tmp_path):
    told = json.loads(report(hub, tmp_path).stdout)
    assert told["rows"] == 20 and "Which river 0?" in told["examples"][0][0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "environment", "code"),
    [
        ({"revision": "v9"}, {}, "data-missing"),
        ({"split": "nothing"}, {}, "data-hub"),
        ({}, {"HF_HUB_OFFLINE": "1"}, "data-offline"),
        ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "data-offline"),
    ],
    ids=["no such revision", "no such split", "offline", "no network"],
)
def test_what_cannot_be_had_is_said(hub, tmp_path, source, environment, code):
    done = report(hub, tmp_path, environment=environment, **source)
    assert done.returncode != 0
    assert code in done.stdout + done.stderr and "Traceback" not in done.stderr
