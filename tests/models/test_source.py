"""Where models come from, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import threading

import pytest
from dropforge.errors import EnvironmentFault, ModelError, Reason
from dropforge.models import source as module
from dropforge.models.builtin import builtin_folder
from dropforge.models.source import resolve_model
from dropforge.paths import DataRoot
from dropforge.settings import settings
from dropforge.spec import ModelSpec


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPFORGE_CACHE", str(tmp_path / "cache"))
    settings.cache_clear()
    yield DataRoot(tmp_path / "root").create()
    settings.cache_clear()


def resolve(root, model_id, **fields):
    return resolve_model(ModelSpec(id=model_id, **fields), root=root)


def refused(root, model_id, **fields):
    with pytest.raises((ModelError, EnvironmentFault)) as caught:
        resolve(root, model_id, **fields)
    return caught.value


def folder_model(root, name, files):
    folder = root.models / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


COMPLETE = {"config.json": {"model_type": "llama"}, "model.safetensors": "x", "tokenizer.json": "{}"}


def test_builtin_is_made_once_and_kept(root):
    first = resolve(root, "builtin:tiny-llama")
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    assert (first.kind, first.path.parent) == ("builtin", settings().cache / "models")
    assert first.revision and first.path.name == f"tiny-llama-{first.revision}"
    assert first.path == builtin_folder("builtin:tiny-llama")
    assert resolve(root, "builtin:tiny-llama") == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in first.path.iterdir())


def test_a_folder_is_found_with_and_without_the_name_of_the_folder_it_lies_in(root):
    folder = folder_model(root, "mine", COMPLETE)
    assert resolve(root, "mine").path == resolve(root, "models/mine").path == folder
    folder = folder_model(root, "models/mine", COMPLETE)
    assert resolve(root, "models/models/mine").path == folder


def test_two_at_the_same_time(root, monkeypatch):
    """Both build; one rename wins; neither fails nor leaves anything behind."""
    barrier = threading.Barrier(2)

    def slow(name, folder):
        (folder / "config.json").write_text("{}")
        barrier.wait(timeout=20)

    monkeypatch.setattr(module, "build_builtin", slow)
    pids = iter((1001, 1002))
    monkeypatch.setattr(module.os, "getpid", lambda: next(pids))
    found, failed = [], []

    def run():
        try:
            found.append(resolve(root, "builtin:tiny-qwen3"))
        except Exception as error:  # noqa: BLE001  (whatever happens in the thread fails the test)
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert found[0] == found[1]
    assert [path.name for path in found[0].path.parent.iterdir()] == [found[0].path.name]


def test_a_failed_build_leaves_nothing(root, monkeypatch):
    def broken(name, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(module, "build_builtin", broken)
    with pytest.raises(OSError, match="disk full"):
        resolve(root, "builtin:tiny-llama")
    assert list((settings().cache / "models").iterdir()) == []


def test_unknown_builtin_names_the_nearest(root):
    error = refused(root, "builtin:tiny-lama")
    assert error.code == "model-unknown-builtin"
    assert "builtin:tiny-llama" in error.problems[0].fix


def test_unknown_folder_names_the_nearest(root):
    folder_model(root, "my-llama", COMPLETE)
    error = refused(root, "my-lama")
    assert (error.code, error.reason) == ("model-unknown", Reason.MISSING_INPUT)
    assert "my-llama" in error.problems[0].fix


@pytest.mark.parametrize("name", ("mine", "org/mine"))
def test_a_folder_under_models(root, name):
    folder = folder_model(root, name, COMPLETE)
    found = resolve(root, name)
    assert (found.kind, found.path, found.revision) == ("folder", folder, None)


BAD_FOLDERS = [
    ({"config.json": None}, "model-incomplete", "config.json is missing"),
    ({"config.json": "{"}, "model-incomplete", "not JSON"),
    ({"model.safetensors": None}, "model-incomplete", "no *.safetensors"),
    ({"model.safetensors": None, "pytorch_model.bin": "x"}, "model-pickle-only", "pytorch_model.bin"),
    ({"tokenizer.json": None}, "model-incomplete", "no tokenizer"),
    ({"model.safetensors.index.json": {"weight_map": {"a": "model.safetensors", "b": "two.safetensors"}}}, "model-incomplete", "two.safetensors"),
    ({"config.json": {"model_type": "novel", "auto_map": {"AutoConfig": "x.Y"}}}, "model-remote-code", "novel"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "word"), BAD_FOLDERS, ids=[entry[2] for entry in BAD_FOLDERS])
def test_bad_folders(root, change, code, word):
    folder_model(root, "mine", {name: text for name, text in (COMPLETE | change).items() if text is not None})
    error = refused(root, "mine")
    assert error.code == code
    assert word in str(error)


def test_code_of_a_known_model_type_is_not_needed(root):
    folder_model(root, "mine", COMPLETE | {"config.json": {"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}})
    assert resolve(root, "mine").kind == "folder"
    assert refused(root, "mine", revision="main").code in {"model-unknown"}


def hub(monkeypatch, answer):
    """A hub that answers with a folder or an exception; returns the list of its calls."""
    import huggingface_hub

    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind, status):
    import httpx

    request = httpx.Request("GET", "https://example.org")
    return kind(f"answer {status}", response=httpx.Response(status, request=request))


def test_from_the_hub(root, monkeypatch, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder_model(root, "../snapshots/" + commit, COMPLETE)
    calls = hub(monkeypatch, snapshot)
    (root.secrets / "HF_TOKEN").write_text("token-of-a-test\n")
    found = resolve(root, "org/model", revision="v1")
    assert (found.kind, found.revision) == ("hub", commit)
    name, options = calls[0]
    assert (name, options["revision"], options["token"]) == ("org/model", "v1", "token-of-a-test")
    assert options["local_files_only"] is False
    assert "*.py" not in options["allow_patterns"] and not any(
        "bin" in pattern for pattern in options["allow_patterns"]
    )
    resolve_model(ModelSpec(id="org/model", remote_code=True), root=root, offline=True)
    assert "*.py" in calls[1][1]["allow_patterns"] and calls[1][1]["local_files_only"] is True


def test_answers_of_the_hub(root, monkeypatch):
    from huggingface_hub import errors

    cases = [
        (http_error(errors.GatedRepoError, 403), "model-auth", Reason.AUTH),
        (http_error(errors.RepositoryNotFoundError, 401), "model-auth", Reason.AUTH),
        (http_error(errors.HfHubHTTPError, 403), "model-auth", Reason.AUTH),
        (http_error(errors.RevisionNotFoundError, 404), "model-unknown", Reason.MISSING_INPUT),
        (http_error(errors.HfHubHTTPError, 503), "model-offline", Reason.OFFLINE),
        (errors.LocalEntryNotFoundError("no network"), "model-offline", Reason.OFFLINE),
        (errors.HFValidationError("bad id"), "model-unknown", Reason.MISSING_INPUT),
    ]
    for answer, code, reason in cases:
        hub(monkeypatch, answer)
        error = refused(root, "org/model")
        assert (error.code, error.reason) == (code, reason), answer
        assert "token-of-a-test" not in str(error)


def test_a_hub_model_without_safetensors(root, monkeypatch, tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub(monkeypatch, folder)
    assert refused(root, "org/model").code == "model-pickle-only"
