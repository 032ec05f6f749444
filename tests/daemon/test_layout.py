"""A data root that another version wrote: migrated or refused with the reason (test 20); one that cannot be written."""

from __future__ import annotations

import pytest
from daemon_harness import Harness, drop, places, spec_text
from dropforge.daemon.layout import bring_up_to_date, open_root
from dropforge.daemon.queue import FOLDERS, find, put
from dropforge.daemon.rejection import rejections
from dropforge.errors import EnvironmentFault
from dropforge.files import read_json, regular_files, sha256_file, write_json
from dropforge.paths import DataRoot


def with_jobs_in_every_state(root: DataRoot) -> dict[str, str]:
    """Folder to id: a root as this version leaves it."""
    with Harness(root) as harness:
        for folder in FOLDERS:
            if folder != "rejected":
                drop(root, f"{folder}.yaml", spec_text(f"for {folder[::-1]} steps-3"))
        drop(root, "bad.yaml", spec_text(extra="nonsense: 1\n"))
        harness.until(lambda: len(places(root).get("done", [])) == 7 and list(rejections(root)))
    at = {}
    for job_id in places(root)["done"]:
        folder = next(name for name in FOLDERS if f"-{name[::-1]}-" in job_id)
        found = find(root, job_id)
        assert found is not None
        if folder != "done":
            (root.path / "done" / f"{job_id}.json").unlink()
            put(root, folder, found[1])
        at[folder] = job_id
    return at


def test_jobs_in_every_state_survive_a_new_version(root: DataRoot) -> None:
    at = with_jobs_in_every_state(root)
    done: list[int] = []

    def migrate(data_root: DataRoot) -> None:
        done.append(1)
        (data_root.path / "migrated").write_text("yes")

    assert bring_up_to_date(root, newest=2, migrations={1: migrate}) == [1]
    assert bring_up_to_date(root, newest=2, migrations={1: migrate}) == []
    assert done == [1]
    write_json(root.state / "layout.json", {"layout": 1, "dropforge": "0.1"})
    with Harness(root) as harness:
        harness.until(lambda: len(places(root).get("done", [])) >= 3)
    found = places(root)
    assert set(found["done"]) == {at["queue"], at["running"], at["done"]}
    assert {folder: found[folder] for folder in ("held", "partial", "failed", "cancelled")} == {
        folder: [at[folder]] for folder in ("held", "partial", "failed", "cancelled")
    }


def test_a_migration_that_was_cut_off_is_done_again(root: DataRoot) -> None:
    def cut_off(data_root: DataRoot) -> None:
        raise KeyboardInterrupt

    bring_up_to_date(root)
    with pytest.raises(KeyboardInterrupt):
        bring_up_to_date(root, newest=2, migrations={1: cut_off})
    assert read_json(root.state / "layout.json")["layout"] == 1
    assert bring_up_to_date(root, newest=2, migrations={1: lambda data_root: None}) == [1]


def test_an_older_version_refuses_and_changes_nothing(root: DataRoot) -> None:
    with Harness(root) as harness:
        drop(root, "job.yaml", spec_text("steps-2"))
        harness.until_in("done")
    write_json(root.state / "layout.json", {"layout": 2, "dropforge": "3.0"})
    before = {path: sha256_file(path) for path in regular_files(root.path) if path.name != "daemon.log"}
    with pytest.raises(EnvironmentFault) as caught, Harness(root):
        pass
    assert caught.value.code == "data-root-newer"
    assert "version 3.0" in str(caught.value)
    assert {path: sha256_file(path) for path in before} == before


def test_a_root_that_cannot_be_made_says_what_to_do(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault) as caught:
        open_root(DataRoot(tmp_path / "file"))
    assert caught.value.code == "data-root-unusable"
    assert "mount it writable" in str(caught.value)
