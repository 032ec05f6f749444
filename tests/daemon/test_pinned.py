"""Data is read through the file that was checked, whatever happens to its name (test 27)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dropforge import pinned as module
from dropforge.errors import DataError
from dropforge.locate import data_locator
from dropforge.paths import DataRoot
from dropforge.pinned import pinned


@pytest.fixture
def into(root: DataRoot) -> Path:
    return root.path / "runs" / "x" / "cache" / "input"


def test_the_name_is_kept_and_the_file_is_the_same(root: DataRoot, into: Path) -> None:
    locate = pinned(data_locator(root), below=root.path, into=into)
    found = locate("rows.jsonl")
    assert found.name == "rows.jsonl" and found.is_relative_to(into)
    assert found.stat().st_ino == (root.datasets / "rows.jsonl").stat().st_ino
    assert locate("rows.jsonl") == found
    with pytest.raises(DataError):
        locate("absent.jsonl")


def test_a_folder_with_folders(root: DataRoot, into: Path) -> None:
    (root.datasets / "set" / "inner").mkdir(parents=True)
    (root.datasets / "set" / "inner" / "a.jsonl").write_text("a")
    (root.datasets / "set" / "b.jsonl").write_text("b")
    found = pinned(data_locator(root), below=root.path, into=into)("set")
    assert {str(path.relative_to(found)): path.read_text() for path in found.rglob("*") if path.is_file()} == {
        "inner/a.jsonl": "a", "b.jsonl": "b"}  # fmt: skip


@pytest.mark.parametrize("swapped", ["the file", "a folder above it", "a file in a folder"])
def test_data_swapped_for_a_link_after_the_check_is_not_read(
    root: DataRoot, into: Path, tmp_path: Path, swapped: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "own.jsonl").write_text("secret")
    folder = root.datasets / "set"
    folder.mkdir()
    (folder / "own.jsonl").write_text("mine")
    checked = data_locator(root)

    def locate(path: str) -> Path:
        found = checked(path)
        if swapped == "a folder above it":
            folder.rename(root.datasets / "moved")
            folder.symlink_to(outside)
        else:
            (folder / "own.jsonl").unlink()
            (folder / "own.jsonl").symlink_to(outside / "own.jsonl")
        return found

    with pytest.raises(DataError) as caught:
        pinned(locate, below=root.path, into=into)("set" if swapped == "a file in a folder" else "set/own.jsonl")
    assert caught.value.code == "data-refused"
    assert not [path for path in into.rglob("*") if path.is_file() and path.read_text() == "secret"]


def test_a_swap_after_pinning_changes_nothing(root: DataRoot, into: Path, tmp_path: Path) -> None:
    found = pinned(data_locator(root), below=root.path, into=into)("rows.jsonl")
    (tmp_path / "secret").write_text("secret")
    (root.datasets / "rows.jsonl").unlink()
    (root.datasets / "rows.jsonl").symlink_to(tmp_path / "secret")
    assert found.read_text() == '{"text": "hello"}\n'


def test_a_file_that_cannot_be_linked_is_copied(root: DataRoot, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise PermissionError("protected_hardlinks")

    monkeypatch.setattr(module.os, "link", refuse)
    found = pinned(data_locator(root), below=root.path, into=into)("rows.jsonl")
    assert found.read_text() == (root.datasets / "rows.jsonl").read_text()
    assert found.stat().st_ino != (root.datasets / "rows.jsonl").stat().st_ino
    assert not os.path.samefile(found, root.datasets / "rows.jsonl")  # noqa: PTH121
