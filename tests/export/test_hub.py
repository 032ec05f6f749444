"""Pushing to the hub, against a stand-in of its API on the loopback address."""

from __future__ import annotations

import json

import pytest
from dropforge.errors import EnvironmentFault, ExportError
from dropforge.export.hub_plan import plan_uploads
from dropforge.export.hub_push import HubTarget, push
from dropforge.export.publish import publish
from dropforge.export.request import ExportReport
from dropforge.files import write_json
from dropforge.paths import ResultFolder
from hub_stand_in import TOKEN, StandIn, only_loopback

# huggingface_hub's own way to call httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "stand-in/test-model"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in; xet, huggingface_hub's other way to upload, is off because it has servers of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with only_loopback(monkeypatch), StandIn().running() as hub:
        yield hub


@pytest.fixture
def result(tmp_path) -> ResultFolder:
    """A result of every kind, with files of the right names."""
    files = {
        "adapter/adapter_config.json": "{}", "adapter/adapter_model.safetensors": "a" * 999,
        "merged/config.json": "{}", "merged/model.safetensors": "m" * 5000,
        "gguf/x-Q8_0.gguf": "q" * 4000, "gguf/x-Q4_K_M-00001-of-00002.gguf": "1", "gguf/x-Q4_K_M-00002-of-00002.gguf": "2",
        "Modelfile": "FROM ./gguf/x-Q8_0.gguf\nREQUIRES 0.30.0\n", "fp8/model.safetensors": "f",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / "result" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "result" / name).write_text(text)
    return ResultFolder(tmp_path / "result")


def report(kind, path, *, ok=True) -> ExportReport:
    return ExportReport(kind=kind, ok=ok, path=path, bytes=1, seconds=0.0)


REPORTS = (
    report("adapter", "adapter"), report("merged", "merged"), report("gguf:q8_0", "gguf/x-Q8_0.gguf"),
    report("gguf:q4_k_m", "gguf/x-Q4_K_M-00001-of-00002.gguf"), report("ollama", "Modelfile"), report("fp8", "", ok=False),
)  # fmt: skip


def target(hub, **changes) -> HubTarget:
    return HubTarget(**{"token": TOKEN, "endpoint": hub.endpoint, **changes})


def test_every_kind_has_its_repository(result):
    uploads = plan_uploads(result, REPORTS, repo=REPO)
    assert {upload.repo: [name for name, _ in upload.files] for upload in uploads} == {
        f"{REPO}-lora": ["adapter_config.json", "adapter_model.safetensors"],
        REPO: ["config.json", "model.safetensors"],
        f"{REPO}-GGUF": [
            "Modelfile", "x-Q4_K_M-00001-of-00002.gguf", "x-Q4_K_M-00002-of-00002.gguf", "x-Q8_0.gguf",
        ],
    }  # fmt: skip
    assert [upload.relation for upload in uploads] == ["adapter", "finetune", "quantized"]


@pytest.mark.parametrize(("kinds", "repos"), [((2, 4), [REPO]), ((0,), [REPO]), ((0, 2), [REPO, f"{REPO}-GGUF"])])
def test_a_single_kind_goes_to_the_name_that_was_asked_for(result, kinds, repos):
    uploads = plan_uploads(result, tuple(REPORTS[place] for place in kinds), repo=REPO)
    assert [upload.repo for upload in uploads] == repos


def test_what_arrives_is_what_was_made(hub, result):
    uploads = plan_uploads(result, REPORTS, repo=REPO)
    log = []
    done = push(uploads, target=target(hub), card=lambda upload: f"card of {upload.kind}", log=log.append)
    assert set(hub.repos) == {REPO, f"{REPO}-lora", f"{REPO}-GGUF"}
    for upload in uploads:
        repo = hub.repos[upload.repo]
        assert repo["private"] and len(repo["commits"]) == 1
        assert repo["files"].pop("README.md").decode() == f"card of {upload.kind}"
        for name, path in upload.files:
            if name != "Modelfile":
                assert repo["files"][name] == path.read_bytes()
        assert set(repo["files"]) == {name for name, _ in upload.files}
    assert hub.repos[f"{REPO}-GGUF"]["files"]["Modelfile"].startswith(b"FROM ./x-Q8_0.gguf\n")
    assert [entry["repo"] for entry in done] == [upload.repo for upload in uploads]
    assert all(len(entry["commit"]) == 40 for entry in done)
    assert len(log) == 3


def test_pushing_again_uploads_no_large_file_twice(hub, result):
    uploads = plan_uploads(result, REPORTS, repo=REPO)
    for _ in range(2):
        push(uploads, target=target(hub, private=False), card=lambda upload: "card", log=lambda text: None)
    assert not hub.repos[REPO]["private"]
    stored = [path for method, path in hub.requests if method == "PUT"]
    assert len(stored) == len(set(stored)) == 5


def test_a_dry_run_sends_nothing(hub, result):
    log = []
    done = push(
        plan_uploads(result, REPORTS, repo=REPO), target=target(hub, dry_run=True), card=str, log=log.append
    )  # fmt: skip
    assert hub.requests == []
    assert [entry["dry_run"] for entry in done] == [True] * 3
    assert log[1] == f"would push to {REPO}: 3 files, 0.0 MB"


@pytest.mark.parametrize(
    ("changes", "fail", "code"),
    [
        ({"token": "hf_wrong"}, None, "hub-auth"),
        ({}, ("/commit/", 403), "hub-auth"),
        ({}, ("/preupload/", 400), "hub-unreachable"),
        ({"endpoint": "http://127.0.0.1:9"}, None, "hub-unreachable"),
    ],
)
def test_refusals_say_what_to_do(hub, result, changes, fail, code):
    hub.fail = fail
    with pytest.raises(EnvironmentFault) as error:
        push(plan_uploads(result, REPORTS, repo=REPO), target=target(hub, **changes), card=str, log=print)
    assert error.value.code == code
    assert error.value.problems[0].fix


def test_a_file_that_did_not_arrive_is_noticed(hub, result, monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args, **options: ["README.md", "config.json"])
    with pytest.raises(ExportError, match="every file") as error:
        push(plan_uploads(result, REPORTS[1:2], repo=REPO), target=target(hub), card=str, log=print)
    assert error.value.problems[0].why == "missing: model.safetensors"


def test_nothing_to_push(result):
    with pytest.raises(ExportError) as error:
        push(plan_uploads(result, REPORTS[-1:], repo=REPO), target=HubTarget(), card=str, log=print)
    assert error.value.code == "hub-nothing"


def test_a_retry_pushes_only_what_is_new(hub, result):
    def run(reports) -> ExportReport:
        return publish(result, reports, repo=REPO, target=target(hub), card=lambda upload: "card", log=print)

    hub.fail = ("/commit/", 403)
    failed = run(REPORTS[:2])
    assert (failed.ok, failed.problem.code) == (False, "hub-auth")
    hub.fail = None
    good = run((*REPORTS[:2], failed))
    assert good.ok and good.path == "hub.json"
    assert [entry["repo"] for entry in json.loads((result.path / "hub.json").read_text())] == [f"{REPO}-lora", REPO]
    before = len(hub.requests)
    assert run((*REPORTS[:2], good)) is good
    assert len(hub.requests) == before, "nothing has changed, so nothing is asked"
    assert run((*REPORTS[:3], good)).checks["kinds"] == ["adapter", "gguf:q8_0", "merged"]
    write_json(result.path / "hub.json", [])
    assert f"{REPO}-GGUF" in hub.repos
