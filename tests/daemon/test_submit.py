from __future__ import annotations

from pathlib import Path

import pytest
from daemon_harness import spec_text
from dropforge.daemon.submit import submit
from dropforge.errors import DropforgeError
from dropforge.paths import DataRoot


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def test_a_spec_file(root: DataRoot, home: Path) -> None:
    spec = home / "Support bot.YAML"
    spec.write_text(spec_text())
    first, second = submit(root, spec), submit(root, spec)
    assert first != second
    assert first.parent == root.inbox
    assert first.name.startswith("Support bot.")
    assert first.suffix == ".yaml"
    assert first.read_text() == spec_text()
    assert {path.suffix for path in root.staging.iterdir()} == {".ready"}


def test_a_job_folder(root: DataRoot, home: Path) -> None:
    folder = home / "bot.job"
    (folder / "data").mkdir(parents=True)
    (folder / "job.yaml").write_text(spec_text())
    (folder / "data" / "rows.csv").write_text("a,b\n")
    target = submit(root, folder)
    assert target.suffix == ".job"
    assert (target / "data" / "rows.csv").read_text() == "a,b\n"
    assert (folder / "data" / "rows.csv").exists()


def test_a_spec_with_the_data_it_names(root: DataRoot, home: Path) -> None:
    (home / "spec.yaml").write_text(spec_text())
    (home / "x.jsonl").write_text("{}\n")
    (home / "more").mkdir()
    (home / "more" / "y.jsonl").write_text("{}\n")
    target = submit(root, home / "spec.yaml", files={"x.jsonl": home / "x.jsonl", "sub/more": home / "more"})
    assert target.suffix == ".job"
    assert (target / "job.yaml").read_text() == spec_text()
    assert (target / "x.jsonl").exists()
    assert (target / "sub" / "more" / "y.jsonl").exists()


def test_hostile_and_hidden_names_get_a_harmless_one(root: DataRoot, home: Path) -> None:
    for name in (".hidden.yaml", "a\nb.yaml", "x" * 200 + ".yaml"):
        (home / name).write_text(spec_text())
        target = submit(root, home / name)
        assert "\n" not in target.name
        assert not target.name.startswith(".")
        assert len(target.name) < 200


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda home: home / "absent.yaml", "submit-missing"),
        (lambda home: (home / "rows.csv").write_text("x") and home / "rows.csv", "submit-not-a-spec"),
        (lambda home: home, "submit-not-a-spec"),
        (lambda home: (home / "e.yaml").touch() or home / "e.yaml", "inbox-empty"),
        (lambda home: (home / "l.yaml").symlink_to("/etc/passwd") or home / "l.yaml", "inbox-not-a-file"),
    ],
)
def test_what_cannot_be_a_job_is_refused_and_nothing_is_left(root: DataRoot, home: Path, make, code: str) -> None:
    with pytest.raises(DropforgeError) as caught:
        submit(root, make(home))
    assert caught.value.code == code
    assert [path.name for path in root.inbox.iterdir()] == [".staging"]
    assert list(root.staging.iterdir()) == []


def test_data_outside_the_job_folder_is_refused(root: DataRoot, home: Path) -> None:
    (home / "spec.yaml").write_text(spec_text())
    with pytest.raises(DropforgeError) as caught:
        submit(root, home / "spec.yaml", files={"../../escape": home / "spec.yaml"})
    assert caught.value.code == "submit-link"
    assert not (root.path / "escape").exists()


def test_links_in_a_job_folder_are_refused(root: DataRoot, home: Path) -> None:
    folder = home / "bot.job"
    folder.mkdir()
    (folder / "job.yaml").write_text(spec_text())
    (folder / "rows.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(DropforgeError) as caught:
        submit(root, folder)
    assert caught.value.code == "submit-link"
