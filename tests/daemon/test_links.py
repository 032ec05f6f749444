"""Links, swapped in at the worst moment: refused, and nothing outside is read or written (tests 27 and 36)."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon_harness import Harness, drop, places, spec_text, status
from dropforge.checkpoints import CheckpointStore
from dropforge.daemon import intake
from dropforge.errors import EnvironmentFault
from dropforge.paths import DataRoot, refuse_links


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with a file that must be neither read nor written."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.yaml").write_text(spec_text("outside"))
    return folder


def untouched(outside: Path) -> None:
    assert [path.name for path in outside.iterdir()] == ["secret.yaml"]
    assert (outside / "secret.yaml").read_text() == spec_text("outside")


@pytest.mark.parametrize("moment", ["before the check", "before the claim", "at the claim"])
def test_a_file_that_becomes_a_link_is_no_job(root: DataRoot, outside: Path, monkeypatch, moment: str) -> None:
    def swap() -> None:
        (root.inbox / "job.yaml").unlink(missing_ok=True)
        (root.inbox / "job.yaml").symlink_to(outside / "secret.yaml")

    names = {"before the check": "read_candidate", "before the claim": "_make_run_folder", "at the claim": "commit"}
    real = getattr(intake, names[moment])
    done = []

    def swapped(*args, **kwargs):
        if not done:
            done.append(True)
            swap()
        return real(*args, **kwargs)

    monkeypatch.setattr(intake, names[moment], swapped)
    drop(root, "job.yaml", spec_text("inside"))
    with Harness(root) as harness:
        harness.tick(0.1, times=5)
        harness.tick(40.0, times=3)
        assert not [job for found in places(root).values() for job in found if "outside" in job]
    assert done
    for run in (root.path / "runs").iterdir():
        assert "outside" not in (run / "spec.orig").read_text()
    untouched(outside)


def test_a_job_folder_with_a_link_swapped_in_after_the_check(root: DataRoot, outside: Path, monkeypatch) -> None:
    folder = root.inbox / "a.job"
    folder.mkdir()
    (folder / "job.yaml").write_text(spec_text("folder").replace("rows.jsonl", "own.jsonl"))
    (folder / "own.jsonl").write_text("{}\n")
    real = intake._make_run_folder

    def swapped(*args, **kwargs):
        if not (folder / "own.jsonl").is_symlink():
            (folder / "own.jsonl").unlink()
            (folder / "own.jsonl").symlink_to(outside / "secret.yaml")
        return real(*args, **kwargs)

    monkeypatch.setattr(intake, "_make_run_folder", swapped)
    with Harness(root) as harness:
        harness.tick(0.1, times=8)
        assert places(root) == {}
    assert len(list(root.rejected.glob("*/a.job"))) == 1
    untouched(outside)


def test_checkpoints_that_become_a_link_during_the_run_fail_the_job(root: DataRoot, outside: Path) -> None:
    drop(root, "job.yaml", spec_text("steps-10000 delay-20 save-2"))
    with Harness(root) as harness:
        harness.until(lambda: list((root.path / "runs").glob("*/checkpoints/step-*")))
        (job_id,) = places(root)["running"]
        victim = root.run(job_id).checkpoints
        victim.rename(victim.with_name("moved"))
        victim.symlink_to(outside)
        harness.until_in("failed")
    assert "was replaced" in (root.run(job_id).path / "ERROR.txt").read_text()
    assert status(root.run(job_id))["reason"] == "environment"
    untouched(outside)


def test_a_checkpoint_that_is_a_link_is_not_resumed_from(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.folder.mkdir(parents=True)
    for step in (1, 2):
        store.clean()
        (store.partial / "weights").write_text(str(step))
        store.commit(store.partial, step)
    newest = store.all()[-1].path
    newest.rename(tmp_path / "outside")
    newest.symlink_to(tmp_path / "outside")
    good, skipped = store.newest_good()
    assert good is not None and good.step == 1
    assert skipped == ["step-00000002: it is a link"]
    for step in (3, 4):
        store.clean()
        store.commit(store.partial, step)
    assert (tmp_path / "outside" / "weights").read_text() == "2", "dropping the old one did not follow it"


@pytest.mark.parametrize("part", ["results", "results/name", "results/name/id"])
def test_a_result_folder_that_is_a_link_is_refused(root: DataRoot, outside: Path, part: str) -> None:
    result = root.result("name", "id").path
    refuse_links(result, below=root.path)
    place = root.path / part
    if place.exists():
        place.rmdir()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)
    with pytest.raises(EnvironmentFault) as caught:
        refuse_links(result, below=root.path)
    assert caught.value.code == "path-is-link"
    assert part in str(caught.value)
    untouched(outside)
