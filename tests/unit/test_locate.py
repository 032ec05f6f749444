"""Data named in a spec is found in three places, and never outside them."""

from __future__ import annotations

import os

import pytest
from dropforge.errors import DataError, Reason
from dropforge.locate import data_locator
from dropforge.paths import DataRoot


@pytest.fixture
def root(tmp_path):
    return DataRoot(tmp_path / "data").create()


def test_the_jobs_own_data_wins_over_datasets(root):
    run = root.run("000001-x-00000000")
    run.job_data.mkdir(parents=True)
    for folder in (run.job_data, root.datasets):
        (folder / "a.jsonl").write_text(folder.name)
    assert data_locator(root, run)("a.jsonl").read_text() == "data"
    assert data_locator(root)("a.jsonl").read_text() == "datasets"


def test_the_name_of_the_folder_may_be_written_too(root):
    (root.datasets / "a.jsonl").write_text("a")
    locate = data_locator(root)
    assert locate("datasets/a.jsonl") == locate("a.jsonl") == root.datasets / "a.jsonl"
    with pytest.raises(DataError):
        locate("datasets/b.jsonl")
    with pytest.raises(DataError):
        locate("models/a.jsonl")


def test_a_missing_file_says_where_it_was_looked_for(root, tmp_path):
    with pytest.raises(DataError) as caught:
        data_locator(root, beside=tmp_path)("a.jsonl")
    assert caught.value.code == "data-missing"
    assert caught.value.reason is Reason.MISSING_INPUT
    assert "datasets/" in caught.value.problems[0].why


@pytest.mark.parametrize("kind", ["link", "linked folder", "fifo", "link inside", "broken link"])
def test_links_and_special_files_are_refused(root, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jsonl").write_text("secret")
    name = "a.jsonl"
    if kind == "link":
        (root.datasets / name).symlink_to(outside / "secret.jsonl")
    elif kind == "broken link":
        (root.datasets / name).symlink_to(tmp_path / "nothing")
    elif kind == "linked folder":
        (root.datasets / "d").symlink_to(outside)
        name = "d/secret.jsonl"
    elif kind == "link inside":
        (root.datasets / "d").mkdir()
        (root.datasets / "d" / "x.jsonl").symlink_to(outside / "secret.jsonl")
        name = "d"
    else:
        os.mkfifo(root.datasets / name)
    with pytest.raises(DataError) as caught:
        data_locator(root)(name)
    assert caught.value.code == "data-refused"
