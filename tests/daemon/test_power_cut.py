"""The plug is pulled after every single write, and what was not synced is lost: every state recovers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from daemon_harness import DaemonProcess, Harness, drop, expected_sum, places, spec_text, wait_until
from dropforge.checkpoints import CheckpointStore
from dropforge.files import read_json_lines
from dropforge.paths import DataRoot, RunFolder
from recorded_disk import Disk

STEPS = 6
GOOD = spec_text(f"good steps-{STEPS} delay-1")
BAD = spec_text(extra="nonsense: 1\n")
ROWS = '{"text": "mine"}\n'


@dataclass(frozen=True)
class Cut:
    """One state that a power cut may leave."""

    number: int
    """So many journal lines were done."""
    eager: bool
    root: DataRoot


def record(root: DataRoot, work: Path, *, as_folder: bool) -> Disk:
    """Let a good job and a bad file go all their way, and write down what happens to the disk."""
    if as_folder:
        (root.inbox / "good.job" / "inner").mkdir(parents=True)
    else:
        drop(root, "good.yaml", GOOD)
    drop(root, "bad.yaml", BAD)
    whole(root)
    (work / "blobs").mkdir(parents=True)
    disk = Disk(root.path, work / "blobs", unsynced=root.inbox)
    with DaemonProcess(root, journal=work / "journal") as daemon:
        wait_until(lambda: places(root).get("done") and list(root.rejected.iterdir()), seconds=60)
        daemon.terminate()
        daemon.wait()
    return disk


def cuts(disk: Disk, work: Path, *, every: int) -> Iterator[Cut]:
    """Every `every`-th new state, laid out."""
    seen: set[str] = set()
    for number in disk.replay(work / "journal"):
        for eager in (False, True):
            picture = disk.picture(eager=eager)
            if picture not in seen:
                seen.add(picture)
                if len(seen) % every == 0:
                    target = work / f"cut-{number}-{'eager' if eager else 'strict'}"
                    disk.lay_out(target, eager=eager)
                    yield Cut(number, eager, DataRoot(target))
                    shutil.rmtree(target)


def accepted(root: DataRoot) -> bool:
    """The daemon has taken the good job. Before that its file was never synced by anybody and may be empty."""
    return bool(list((root.path / "runs").glob("*-good-*/data")) or list(root.path.glob("*/*-good-*.json")))


def whole(root: DataRoot) -> None:
    """What a user does about dropped files that are empty after a power cut: copy them once more."""
    for name, text in (("good.yaml", GOOD), ("bad.yaml", BAD)):
        if (root.inbox / name).is_file():
            drop(root, name, text)
    folder = root.inbox / "good.job"
    if folder.is_dir():
        (folder / "job.yaml").write_text(GOOD.replace("rows.jsonl", "inner/own.jsonl"))
        (folder / "inner" / "own.jsonl").write_text(ROWS)


def newest_good(root: DataRoot) -> int:
    """The step of the newest checkpoint that survived whole."""
    steps = [0]
    for folder in (root.path / "runs").glob("*-good-*/checkpoints"):
        checkpoint, _ = CheckpointStore(folder).newest_good()
        steps.append(checkpoint.step if checkpoint else 0)
    return max(steps)


def began_at(run: RunFolder) -> list[int]:
    return [event["step"] for event in read_json_lines(run.events) if event["action"] in ("began", "resumed")]


def recovers(cut: Cut) -> None:
    root = cut.root
    survived = newest_good(root)
    ended_before = bool(list((root.path / "done").iterdir()))
    if accepted(root):
        assert not list(root.inbox.glob("good.*")), "taken once"
    whole(root)
    with Harness(root) as harness:
        harness.until(lambda: places(root).get("done") and list(root.rejected.glob("*/bad.yaml")))
    assert list(places(root)) == ["done"], places(root)
    (job_id,) = places(root)["done"]
    run = root.run(job_id)
    if not ended_before:
        assert (run.path / "final").read_text() == expected_sum(STEPS)
        assert began_at(run)[-1:] in ([survived], []), "it goes on from the newest good checkpoint"
    assert [path.name for path in (root.path / "runs").iterdir()] == [job_id], "nothing lost, nothing doubled"
    assert len(list(root.rejected.glob("*/bad.yaml"))) == 1
    assert [path.name for path in root.inbox.iterdir()] == [".staging"]
    assert all(path.read_text() == BAD for path in root.rejected.glob("*/bad.yaml")), "kept unchanged"
    if run.job_data.is_dir():
        assert (run.job_data / "inner" / "own.jsonl").read_text() == ROWS


def run_cuts(root: DataRoot, work: Path, *, as_folder: bool, every: int) -> int:
    disk = record(root, work, as_folder=as_folder)
    count = 0
    for cut in cuts(disk, work, every=every):
        try:
            recovers(cut)
        except Exception as error:
            where = (work / "journal").read_text().splitlines()[max(0, cut.number - 4) : cut.number]
            raise AssertionError(f"cut {cut.number} ({'eager' if cut.eager else 'strict'}) after {where}") from error
        count += 1
    return count


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_power_cut_at_some_writes(root: DataRoot, tmp_path: Path, as_folder: bool) -> None:
    assert run_cuts(root, tmp_path / "work", as_folder=as_folder, every=50) > 1


@pytest.mark.slow
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_power_cut_at_every_write(root: DataRoot, tmp_path: Path, as_folder: bool, record_property) -> None:
    count = run_cuts(root, tmp_path / "work", as_folder=as_folder, every=1)
    record_property("measured", f"{count} different states after a cut, all recovered")
    assert count > 100


CHECKPOINT = """
import sys
from pathlib import Path
import disk_recorder
root, journal = map(Path, sys.argv[1:])
disk_recorder.install(root, journal)
from dropforge.checkpoints import CheckpointStore
store = CheckpointStore(root / "checkpoints")
store.folder.mkdir()
for step in (1, 2, 3):
    store.clean()
    (store.partial / "state" / "inner").mkdir(parents=True)
    (store.partial / "state" / "inner" / "deep.bin").write_bytes(b"d" * step)
    (store.partial / "adapter.safetensors").write_bytes(b"a" * step)
    store.commit(store.partial, step)
    print(len(journal.read_text().splitlines()), step, flush=True)
"""


def test_a_checkpoint_that_was_reported_survives_every_later_cut(tmp_path: Path) -> None:
    """At each write of a save the one before is whole; once `commit` has returned, this one is."""
    root, work = tmp_path / "root", tmp_path / "work"
    root.mkdir()
    (work / "blobs").mkdir(parents=True)
    disk = Disk(root, work / "blobs")
    done = subprocess.run(
        [sys.executable, "-c", CHECKPOINT, str(root), str(work / "journal")],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    reported = {int(line.split()[0]): int(line.split()[1]) for line in done.stdout.splitlines()}
    promised = 0
    for number in disk.replay(work / "journal"):
        promised = reported.get(number, promised)
        for eager in (False, True):
            target = work / f"{number}-{eager}"
            disk.lay_out(target, eager=eager)
            newest, _ = CheckpointStore(target / "checkpoints").newest_good()
            assert (newest.step if newest else 0) >= promised, f"line {number}, {'eager' if eager else 'strict'}"
    assert promised == 3
