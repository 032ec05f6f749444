"""kill -9 of the real trainer, the daemon or both, 200 times over 20 jobs: every adapter equal to the undisturbed one.

The trainings are tiny and processes are forked from one that has imported everything (warm_stem.py); otherwise a kill would
cost ten seconds of imports. test_random_kills.py kills started processes, fewer times. Slow: `make test-faults`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from daemon_harness import drop, places, wait_until
from dropforge.daemon import attempts, process
from dropforge.daemon.control import request
from dropforge.daemon.lease import holder
from dropforge.daemon.process import ProcessId
from dropforge.paths import DataRoot
from test_random_kills import adapters, nobody_is_left, real_daemon

pytestmark = pytest.mark.slow
SEED = 20261121
KILLS, JOBS, STEPS = 200, 20, 60
PATIENCE = 2400


class Stem:
    """The process that has imported everything, and forks daemons."""

    def __init__(self, root: DataRoot) -> None:
        self.root = root
        command = [sys.executable, "-P", str(Path(__file__).parent / "warm_stem.py"), str(root.path)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"
        self.daemon: ProcessId | None = None

    def _line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def start(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("daemon\n")
        self.child.stdin.flush()
        self.daemon = ProcessId.of(int(self._line()))
        assert self.daemon is not None, (self.root.state / "stem.log").read_text()

    def kill(self) -> None:
        assert self.daemon is not None
        process.kill(self.daemon.pid)
        wait_until(lambda: self.daemon is None or not self.daemon.alive())

    def close(self) -> None:
        if self.daemon is not None and self.daemon.alive():
            self.kill()
        self.child.kill()
        self.child.communicate()


@pytest.fixture
def stems():
    """stems(root) -> a Stem that is closed after the test."""
    made: list[Stem] = []

    def make(root: DataRoot) -> Stem:
        made.append(Stem(root))
        return made[-1]

    yield make
    for stem in made:
        stem.close()


def drop_jobs(root: DataRoot) -> None:
    rows = [{"instruction": f"What is the double of {n}?", "output": str(2 * n)} for n in range(12)]
    (root.datasets / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(JOBS):
        text = (f"version: 1\nname: real{number:02}\nmodel: {{id: 'builtin:tiny-llama', max_seq_length: 64}}\n"
                "adapter: {r: 4, lora_dropout: 0.1}\ndata: doubles.jsonl\n"
                f"train: {{learning_rate: 3e-3, effective_batch_size: 4, max_steps: {STEPS}, save_steps: 3, seed: {number}}}\n"
                "export: [adapter]\n")  # fmt: skip
        drop(root, f"real{number:02}.yaml", text)


def newest(root: DataRoot) -> str:
    """The newest checkpoint of the job that runs, with the job's id; empty: none yet."""
    paths = [path for job in places(root).get("running", []) for path in root.run(job).checkpoints.glob("step-*")]
    return str(max(paths, default=""))


def release_held(root: DataRoot) -> int:
    """Killed again and again without progress, a job is held: a person looks and goes on."""
    held = [job for job in places(root).get("held", []) if not (root.control / f"{job}.release").exists()]
    for job in held:
        request(root, job, "release")
    return len(held)


def kill_many(root: DataRoot, stem: Stem) -> Counter[str]:
    """Half the kills come soon after a new checkpoint, so that the jobs get on; the others at any moment."""
    choose, done = random.Random(SEED), Counter[str]()
    while sum(done.values()) - done["released"] < KILLS and len(places(root).get("done", [])) < JOBS:
        before, moment = newest(root), time.monotonic()
        if choose.random() < 0.5:
            while newest(root) in (before, "") and time.monotonic() - moment < 60:
                time.sleep(0.02)
                done["released"] += release_held(root)
            time.sleep(choose.uniform(0, 0.1))
        else:
            time.sleep(choose.uniform(0.05, 2.0))
        victim = choose.choice(["trainer", "trainer", "daemon", "both"])
        running = places(root).get("running", [])
        held = holder(root.run(running[0])) if running else None
        if victim != "daemon":
            if held is None or not held.alive():
                continue
            process.kill(held.pid)
        if victim != "trainer":
            stem.kill()
            stem.start()
        done[victim] += 1
        done["released"] += release_held(root)
    return done


def count_actions(root: DataRoot, action: str) -> int:
    texts = [(root.run(job).path / "events.jsonl").read_text() for job in places(root)["done"]]
    return sum(text.count(f'"action": "{action}"') for text in texts)


def test_200_kills_of_the_real_trainer(root: DataRoot, tmp_path: Path, stems, record_property) -> None:
    calm = DataRoot(tmp_path / "calm").create()
    for data_root in (calm, root):
        drop_jobs(data_root)
    undisturbed = stems(calm)
    undisturbed.start()
    wait_until(lambda: len(places(calm).get("done", [])) == JOBS, seconds=PATIENCE)
    undisturbed.close()

    stem = stems(root)
    stem.start()
    done = kill_many(root, stem)
    released = done.pop("released", 0)

    def all_done() -> bool:
        nonlocal released
        released += release_held(root)
        return len(places(root).get("done", [])) == JOBS

    wait_until(all_done, seconds=PATIENCE)
    stem.close()
    nobody_is_left(root)
    assert {folder: len(ids) for folder, ids in places(root).items()} == {"done": JOBS}, "none lost, none doubled"
    assert len(list((root.path / "runs").iterdir())) == JOBS
    assert sum(done.values()) >= KILLS, f"the jobs ended too early to test anything: {done}"
    assert adapters(root) == adapters(calm)
    assert len(adapters(root)) == JOBS
    starts = sum(len(attempts.numbers(root.run(job))) for job in places(root)["done"])
    resumed = count_actions(root, "resume")
    assert resumed >= JOBS
    text = ", ".join(f"{count} of {what}" for what, count in sorted(done.items()))
    record_property("measured", f"real trainer: {sum(done.values())} kills ({text}), {starts} starts of {JOBS} jobs, {resumed} "
                                f"resumed from a checkpoint, {released} released; all {JOBS} adapters byte-equal")  # fmt: skip


def test_a_forked_runner_makes_what_a_started_one_makes(root: DataRoot, tmp_path: Path, stems) -> None:
    """What the test above compares with is what users get."""
    started = DataRoot(tmp_path / "started").create()
    for data_root in (started, root):
        drop_jobs(data_root)
        for path in sorted(data_root.inbox.glob("*.yaml"))[1:]:
            path.unlink()
    stems(root).start()
    daemon = real_daemon(started)
    try:
        wait_until(lambda: places(started).get("done") and places(root).get("done"), seconds=PATIENCE)
    finally:
        daemon.kill()
        daemon.wait()
    assert adapters(started) == adapters(root)
    assert len(adapters(root)) == 1
