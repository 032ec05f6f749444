"""Scenarios on real file systems that are full or read-only: `unshare -m python mounted.py FOLDER SCENARIO`, as root.

Each is a function below that raises when something is not as it should be. What is mounted ends with the process.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from daemon_harness import Harness, drop, expected_sum, places, spec_text, status, trains
from dropforge.checkpoints import CheckpointStore
from dropforge.errors import EnvironmentFault
from dropforge.files import read_json, regular_files
from dropforge.paths import DataRoot

STEPS = 60
SPEC = spec_text(f"steps-{STEPS} delay-20 save-2 slow-export")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def small_disk(folder: Path, *, options: str) -> DataRoot:
    mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    root = DataRoot(folder / "data").create()
    (root.datasets / "rows.jsonl").write_text("{}\n")
    return root


def fill_bytes(root: DataRoot) -> list[Path]:
    """Take every byte that is left."""
    filler = root.path.parent / f"filler-{len(list(root.path.parent.iterdir()))}"
    with filler.open("wb", buffering=0) as stream:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return [filler]


def fill_inodes(root: DataRoot) -> list[Path]:
    """Take every name that is left: bytes are free, files cannot be made."""
    made: list[Path] = []
    try:
        while True:
            made.append(root.path.parent / f"name-{uuid4()}")
            made[-1].touch()
    except OSError as error:
        assert error.errno == errno.ENOSPC
        made.pop()
    return made


Fill = Callable[[DataRoot], list[Path]]


def fill_for_good(harness: Harness, fill: Fill) -> list[Path]:
    """Until the daemon has given its reserve back and that is full as well."""
    made = fill(harness.root)
    harness.tick(2.0, times=2)
    return made + fill(harness.root)


def free(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def nothing_torn(root: DataRoot) -> None:
    """No file that carries a final name is half there."""
    for path in regular_files(root.path):
        if path.suffix == ".json" and not path.name.startswith(".tmp-"):
            read_json(path)
    for run in (root.path / "runs").iterdir():
        faults = [checkpoint.verify() for checkpoint in CheckpointStore(run / "checkpoints").all()]
        assert not any(faults), faults


def goes_on(harness: Harness) -> None:
    """After there is room again: by itself, within the time after which a fault is tried again."""
    root = harness.root
    harness.tick(70.0, times=2)
    harness.until(lambda: places(root).get("done"), seconds=40)
    (job_id,) = places(root)["done"]
    assert (root.run(job_id).path / "final").read_text() == expected_sum(STEPS)


def waits(harness: Harness) -> None:
    """The job has stopped. Its ticket moves to queue/ as soon as there is room for saying so."""
    root = harness.root
    harness.until(lambda: not harness.daemon._worker.running, seconds=40)
    assert list(places(root)) in (["queue"], ["running"]), places(root)
    nothing_torn(root)


def at_intake(folder: Path, options: str, fill: Fill) -> None:
    root = small_disk(folder, options=options)
    drop(root, "job.yaml", SPEC)
    with Harness(root) as harness:
        made = fill_for_good(harness, fill)
        harness.tick(40.0, times=3)
        assert places(root) == {} or list(places(root)) == ["queue"], places(root)
        nothing_torn(root)
        free(made)
        harness.tick(40.0)
        goes_on(harness)


def while_training(folder: Path, options: str, fill: Fill) -> None:
    """The next save, log line, status and metrics line all find no room."""
    root = small_disk(folder, options=options)
    drop(root, "job.yaml", SPEC)
    with Harness(root) as harness:
        harness.until(lambda: places(root).get("running") and trains(root.run(places(root)["running"][0])))
        made = fill_for_good(harness, fill)
        waits(harness)
        made += fill(root)
        harness.tick(40.0, times=3)
        waits(harness)
        free(made)
        goes_on(harness)


def at_export(folder: Path, options: str, fill: Fill) -> None:
    root = small_disk(folder, options=options)
    drop(root, "job.yaml", spec_text("steps-60 delay-1 save-2 slow-export"))
    with Harness(root) as harness:
        harness.until(
            lambda: (
                places(root).get("running") and status(root.run(places(root)["running"][0])).get("state") == "exporting"
            )
        )
        made = fill_for_good(harness, fill)
        waits(harness)
        assert not list((root.path / "runs").glob("*/final"))
        free(made)
        goes_on(harness)


def read_only_root(folder: Path) -> None:
    root = small_disk(folder, options="size=200m")
    drop(root, "job.yaml", SPEC)
    mount("-o", "remount,ro", str(folder))
    try:
        with Harness(root):
            raise AssertionError("it must not serve")
    except EnvironmentFault as error:
        assert error.code == "data-root-unusable", error
        assert "Read-only" in str(error) and "writable" in str(error), error
    mount("-o", "remount,rw", str(folder))
    with Harness(root) as harness:
        goes_on(harness)


def root_turns_read_only(folder: Path) -> None:
    """In the middle of a job: the daemon lives, says so where it can, and everything goes on when it is writable again."""
    root = small_disk(folder, options="size=200m")
    drop(root, "job.yaml", spec_text("steps-60 delay-20 save-2"))
    with Harness(root) as harness:
        harness.until(lambda: places(root).get("running") and trains(root.run(places(root)["running"][0])))
        done = subprocess.run(["mount", "-o", "remount,ro,force", str(folder)], capture_output=True)
        if done.returncode != 0:  # a log is open for writing: cover the root with a read-only view of itself instead
            mount("--bind", str(folder), str(folder))
            mount("-o", "remount,bind,ro", str(folder))
        harness.tick(2.0, times=5)
        assert harness.daemon._faults.messages, "it knows"
        subprocess.run(["umount", str(folder)], check=False)
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=False)
        harness.tick(40.0)
        harness.until(lambda: places(root).keys() & {"done", "failed", "held"}, seconds=60)


def read_only_inbox(folder: Path) -> None:
    root = small_disk(folder, options="size=200m")
    drop(root, "before.yaml", spec_text("before steps-60 delay-1"))
    drop(root, "after.yaml", spec_text("after steps-60 delay-1"))
    with Harness(root) as harness:
        mount("--bind", str(root.inbox), str(root.inbox))
        mount("-o", "remount,bind,ro", str(root.inbox))
        harness.tick(10.0, times=3)
        assert places(root) == {} and not list((root.path / "runs").iterdir())
        page = root.status_page.read_text()
        assert "inbox/ cannot be written, so no job is accepted" in page, page
        subprocess.run(["umount", str(root.inbox)], check=True)
        harness.tick(40.0)
        harness.until(lambda: len(places(root).get("done", [])) == 2)
        harness.tick(3.0)
        assert "Problems" not in root.status_page.read_text()


BYTES, INODES = "size=128m", "size=200m,nr_inodes=1500"
SCENARIOS: dict[str, Callable[[Path], None]] = {
    "full-at-intake": lambda folder: at_intake(folder, BYTES, fill_bytes),
    "full-while-training": lambda folder: while_training(folder, BYTES, fill_bytes),
    "full-at-export": lambda folder: at_export(folder, BYTES, fill_bytes),
    "no-inodes-at-intake": lambda folder: at_intake(folder, INODES, fill_inodes),
    "no-inodes-while-training": lambda folder: while_training(folder, INODES, fill_inodes),
    "no-inodes-at-export": lambda folder: at_export(folder, INODES, fill_inodes),
    "read-only-root": read_only_root,
    "root-turns-read-only": root_turns_read_only,
    "read-only-inbox": read_only_inbox,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[2]](Path(sys.argv[1]))
