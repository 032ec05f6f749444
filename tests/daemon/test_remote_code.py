"""Code that comes with a model: held until three people say so, and its marker file is never made before (test 29)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from daemon_harness import ticket
from dropforge.cli import main
from dropforge.daemon.queue import put
from dropforge.errors import DataError, ModelError, Reason
from dropforge.events import RunLog
from dropforge.files import read_json, regular_files, write_json
from dropforge.job import run_job
from dropforge.models.code_approval import approval_path, approve, resolve_approved
from dropforge.models.remote_code import scan
from dropforge.models.source import resolve_model
from dropforge.paths import DataRoot, RunFolder
from dropforge.settings import settings
from dropforge.spec import ModelSpec
from dropforge.spec_check import check, to_yaml
from dropforge.states import State
from dropforge.stop import StopSignal

CODE = """
import os
os.system("touch MARKER")
from transformers import LlamaConfig, LlamaForCausalLM
class NovelConfig(LlamaConfig):
    model_type = "novel"
class NovelForCausalLM(LlamaForCausalLM):
    config_class = NovelConfig
"""
AUTO_MAP = {"AutoConfig": "novel.NovelConfig", "AutoModelForCausalLM": "novel.NovelForCausalLM"}
ASKED = ModelSpec(id="mine", remote_code=True)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "owned"


@pytest.fixture
def run(root: DataRoot) -> RunFolder:
    folder = root.run(ticket().id)
    folder.path.mkdir(parents=True)
    put(root, "held", ticket())
    return folder


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """allow(True) is a Dropforge that was started with the flag. What transformers copies stays in this test's folder."""

    def set_to(on: bool) -> None:
        monkeypatch.setenv("DROPFORGE_ALLOW_REMOTE_CODE", "1" if on else "0")
        settings.cache_clear()

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    set_to(False)
    yield set_to
    settings.cache_clear()


@pytest.fixture
def folder(root: DataRoot, marker: Path) -> Path:
    """models/mine: a working model of a type that transformers does not know, whose code leaves a mark when it runs."""
    built = resolve_model(ModelSpec(id="builtin:tiny-llama"), root=root).path
    folder = root.models / "mine"
    folder.mkdir()
    for path in regular_files(built):
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder, model_type="novel", auto_map=AUTO_MAP, architectures=["NovelForCausalLM"])
    (folder / "novel.py").write_text(CODE.replace("MARKER", str(marker)))
    return folder


def change(folder: Path, **fields) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **fields})


def held(root: DataRoot, run: RunFolder, model: ModelSpec = ASKED) -> ModelError:
    with pytest.raises(ModelError) as error:
        resolve_approved(model, root=root, run=run)
    assert error.value.reason is Reason.REMOTE_CODE
    return error.value


def approve_it(root: DataRoot, run: RunFolder, folder: Path) -> str:
    fingerprint = scan(folder).fingerprint
    approve(root, run, digits=fingerprint)
    return fingerprint


def test_a_spec_that_does_not_ask_is_told_how(root, run, folder, allow, marker) -> None:
    allow(True)
    error = held(root, run, ModelSpec(id="mine"))
    assert error.code == "model-remote-code"
    assert "remote_code: true" in str(error)
    assert not marker.exists()


def test_each_of_the_other_two_signs_is_needed(root, run, folder, allow, marker) -> None:
    error = held(root, run)
    assert error.code == "model-code-held"
    assert "DROPFORGE_ALLOW_REMOTE_CODE=1" in str(error) and "nobody has approved" in str(error)
    assert "novel.py" in str(error)
    allow(True)
    error = held(root, run)
    assert "was started without" not in str(error)
    approve_it(root, run, folder)
    assert resolve_approved(ASKED, root=root, run=run).runs_code
    allow(False)
    error = held(root, run)
    assert "nobody has approved" not in str(error)
    assert not marker.exists(), "looking at code is not running it"


@pytest.mark.parametrize("what", ["changed", "added", "removed", "config"])
def test_an_approval_is_of_these_files_and_no_others(root, run, folder, allow, what: str) -> None:
    allow(True)
    (folder / "helper.py").write_text("x = 1\n")
    held(root, run)
    approve_it(root, run, folder)
    assert resolve_approved(ASKED, root=root, run=run).runs_code
    if what == "changed":
        (folder / "helper.py").write_text("x = 2\n")
    elif what == "added":
        (folder / "deep").mkdir()
        (folder / "deep" / "more.py").write_text("")
    elif what == "removed":
        (folder / "helper.py").unlink()
    else:
        change(folder, auto_map={**AUTO_MAP, "AutoConfig": "helper.Other"})
    held(root, run)


def test_an_approval_that_cannot_be_read_is_none(root, run, folder, allow) -> None:
    allow(True)
    held(root, run)
    path = approval_path(root, approve_it(root, run, folder))
    for text in ("", "{", "[]", '{"schema": 1, "fingerprint": "another"}'):
        path.write_text(text)
        held(root, run)
    path.unlink()
    path.mkdir()
    held(root, run)


def test_code_elsewhere_cannot_be_approved(root, run, folder, allow) -> None:
    allow(True)
    change(folder, auto_map={**AUTO_MAP, "AutoModelForCausalLM": "else/where--novel.NovelForCausalLM"})
    assert held(root, run).code == "model-code-elsewhere"
    change(folder, model_type="llama", auto_map=None, text_config={"attn_implementation": "else/where"})
    assert held(root, run, ModelSpec(id="mine")).code == "model-foreign-kernel"


def test_a_type_that_transformers_knows_is_loaded_without_its_code(root, run, folder, allow) -> None:
    allow(True)
    change(folder, model_type="llama")
    assert not resolve_approved(ASKED, root=root, run=run).runs_code


@pytest.mark.parametrize("revision", [None, "main", "0123456789abcdef"])
def test_a_hub_model_without_its_full_commit_is_held_before_anything_is_fetched(
    root, run, allow, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("it fetches"))
    allow(True)
    assert held(root, run, ModelSpec(id="org/model", revision=revision, remote_code=True)).code == "model-code-commit"


def test_release_on_the_command_line(root, run, folder, allow, capsys) -> None:
    base = ["release", run.id, "--data", str(root.path)]
    assert main([*base, "--trust-code", "0" * 16]) == 2, "nothing waits for an approval yet"
    held(root, run)
    fingerprint = scan(folder).fingerprint
    assert main([*base, "--trust-code", "0" * 16]) == 2
    assert main([*base, "--trust-code", fingerprint[:8]]) == 2, "too few digits to mean anything"
    assert not approval_path(root, fingerprint).exists()
    capsys.readouterr()
    assert main(base) == 0, "releasing is allowed, and approves nothing"
    assert not approval_path(root, fingerprint).exists()
    assert main([*base, "--trust-code", fingerprint[:12]]) == 0
    assert "novel.py" in capsys.readouterr().err
    assert (root.control / f"{run.id}.release").exists()
    allow(True)
    assert resolve_approved(ASKED, root=root, run=run).runs_code


class Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return __import__("os").system, (f"touch {self.marker}",)


def test_pickles_are_not_opened(root, run, folder, allow, marker) -> None:
    """Alone, or named by an index that lies beside good weights."""
    allow(True)
    change(folder, model_type="llama", auto_map=None)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    with pytest.raises(ModelError) as error:
        resolve_approved(ASKED, root=root, run=run)
    assert error.value.code == "model-incomplete"
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    assert held(root, run).code == "model-pickle-only"
    assert not marker.exists()


def test_a_data_set_that_is_a_script_is_refused(root, marker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library finds it: a folder org/name below the folder the job runs in."""
    from dropforge.data.sources import open_source
    from dropforge.locate import data_locator
    from dropforge.spec import SourceSpec

    (root.path / "org" / "name").mkdir(parents=True)
    (root.path / "org" / "name" / "name.py").write_text(f"import os\nos.system('touch {marker}')\n")
    monkeypatch.chdir(root.path)
    with pytest.raises(DataError) as error:
        open_source(SourceSpec(path="org/name"), locate=data_locator(root), warn=print)
    assert error.value.code == "data-hub"
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_whole_job_runs_the_code_only_after_all_three_signs(root, run, folder, allow, marker) -> None:
    rows = [{"instruction": f"{n}?", "output": str(n)} for n in range(8)]
    (root.datasets / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (b"version: 1\nname: novel\nmodel: {id: mine, remote_code: true, max_seq_length: 64}\ndata: rows.jsonl\n"
            b"train: {max_steps: 2, effective_batch_size: 2}\nexport: [adapter]\n")  # fmt: skip
    run.spec_original.write_bytes(text)
    run.spec_resolved.write_text(to_yaml(check(text, filename="job.yaml").resolved))
    for on in (False, True):
        allow(on)
        with pytest.raises(ModelError) as error:
            run_job(run, root=root, attempt=1, log=RunLog(run), stop=StopSignal())
        assert error.value.reason is Reason.REMOTE_CODE
        assert not marker.exists()
    approve_it(root, run, folder)
    assert run_job(run, root=root, attempt=2, log=RunLog(run), stop=StopSignal()) is State.SUCCEEDED
    assert marker.exists(), "the mark works, so its absence above means something"
    assert (root.result("novel", run.id).path / "adapter" / "adapter_model.safetensors").exists()
