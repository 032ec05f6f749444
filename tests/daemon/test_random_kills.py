"""kill -9 of the trainer, the daemon or both, at random moments: no job lost, none doubled, every end as if undisturbed.

Slow: `make test-faults`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon_harness import DaemonProcess, Harness, drop, expected_sum, places, spec_text, wait_until
from dropforge.daemon import attempts, process
from dropforge.daemon.control import request
from dropforge.daemon.lease import holder
from dropforge.daemon.singleton import daemon_is_alive
from dropforge.paths import DataRoot

pytestmark = pytest.mark.slow
SEED = 20261121
KILLS, JOBS, STEPS = 200, 20, 60
REAL_KILLS, REAL_JOBS = 20, 3


def kill_at_random(
    root: DataRoot, *, start: Callable[[], subprocess.Popen[bytes]], kills: int, pause: Callable[[random.Random], float],
    jobs: int,
) -> Counter[str]:  # fmt: skip
    """Kill until `kills` are done or all jobs have ended. Returns what was killed, and how many jobs a person released."""
    choose, done = random.Random(SEED), Counter[str]()
    daemon = start()
    while sum(done.values()) - done["released"] < kills and len(places(root).get("done", [])) < jobs:
        time.sleep(pause(choose))
        victim = choose.choice(["trainer", "trainer", "daemon", "both"])
        running = places(root).get("running", [])
        held = holder(root.run(running[0])) if running else None
        if victim != "daemon":
            if held is None or not held.alive():
                continue
            process.kill(held.pid)
        if victim != "trainer":
            daemon.kill()
            daemon.wait()
            daemon = start()
        done[victim] += 1
        for job_id in places(root).get(
            "held", []
        ):  # killed again and again without progress: a person looks and goes on
            request(root, job_id, "release")
            done["released"] += 1
    daemon.kill()
    daemon.wait()
    return done


def nobody_is_left(root: DataRoot) -> None:
    holders = [holder(root.run(path.name)) for path in (root.path / "runs").iterdir()]
    wait_until(lambda: not [old for old in holders if old is not None and old.alive()])


def test_200_kills_over_20_jobs(root: DataRoot, record_property) -> None:
    for number in range(JOBS):
        drop(root, f"job{number:02}.yaml", spec_text(f"good{number:02} steps-{STEPS} delay-25 save-1"))
    children: list[DaemonProcess] = []

    def start() -> subprocess.Popen[bytes]:
        children.append(DaemonProcess(root))
        return children[-1].child

    done = kill_at_random(root, start=start, kills=KILLS, jobs=JOBS, pause=lambda choose: choose.uniform(0.05, 1.2))
    for child in children:
        child.__exit__(None, None, None)
    released = done.pop("released", 0)
    with Harness(root) as harness:

        def look() -> bool:
            nonlocal released
            for job_id in places(root).get("held", []):
                request(root, job_id, "release")
                released += 1
            return len(places(root).get("done", [])) == JOBS

        harness.until(look, seconds=400)
    assert {folder: len(ids) for folder, ids in places(root).items()} == {"done": JOBS}, "none lost, none doubled"
    assert len(list((root.path / "runs").iterdir())) == JOBS
    names = {job_id.partition("-")[2].partition("-")[0] for job_id in places(root)["done"]}
    assert names == {f"good{number:02}" for number in range(JOBS)}
    for job_id in places(root)["done"]:
        assert (root.run(job_id).path / "final").read_text() == expected_sum(STEPS)
    starts = sum(len(attempts.numbers(root.run(job_id))) for job_id in places(root)["done"])
    nobody_is_left(root)
    text = ", ".join(f"{count} of {what}" for what, count in sorted(done.items()))
    record_property(
        "measured", f"{sum(done.values())} kills ({text}), {starts} starts of {JOBS} jobs, {released} released"
    )
    assert sum(done.values()) >= KILLS, "the jobs ended too early to test anything"


def real_daemon(root: DataRoot) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DROPFORGE_DATA": str(root.path), "DROPFORGE_POLL_SECONDS": "0.2",
                   "DROPFORGE_SETTLE_SECONDS": "0.5", "DROPFORGE_DEVICE": "cpu"}  # fmt: skip
    with (root.state / "watch.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "dropforge", "watch"], env=environment, stdout=log, stderr=log
        )


def real_spec(number: int) -> str:
    return (
        f"version: 1\nname: real{number}\nmodel: {{id: 'builtin:tiny-llama', max_seq_length: 128}}\n"
        "adapter: {r: 8, lora_dropout: 0.1}\ndata: doubles.jsonl\n"
        f"train: {{learning_rate: 3e-3, effective_batch_size: 4, max_steps: 120, save_steps: 4, seed: {number}}}\n"
        "export: [adapter]\n"
    )


def drop_real_jobs(root: DataRoot) -> None:
    rows = [{"instruction": f"What is the double of {n}?", "output": str(2 * n)} for n in range(12)]
    (root.datasets / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(REAL_JOBS):
        drop(root, f"real{number}.yaml", real_spec(number))


def adapters(root: DataRoot) -> dict[str, str]:
    """Job name to hash of its adapter."""
    paths = (root.path / "results").glob("*/*/adapter/adapter_model.safetensors")
    return {path.parts[-4]: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_kills_of_the_real_trainer_leave_equal_adapters(root: DataRoot, tmp_path: Path, record_property) -> None:
    calm = DataRoot(tmp_path / "calm").create()
    for data_root in (calm, root):
        drop_real_jobs(data_root)
    daemon = real_daemon(calm)
    wait_until(lambda: len(places(calm).get("done", [])) == REAL_JOBS, seconds=900)
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(60)

    done = kill_at_random(root, start=lambda: real_daemon(root), kills=REAL_KILLS, jobs=REAL_JOBS,
                          pause=lambda choose: choose.uniform(2.0, 14.0))  # fmt: skip
    wait_until(lambda: not daemon_is_alive(root))
    daemon = real_daemon(root)
    wait_until(lambda: len(places(root).get("done", [])) == REAL_JOBS, seconds=900)
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(60)
    released = done.pop("released", 0)
    resumed = sum(
        (root.run(job_id).path / "events.jsonl").read_text().count('"action": "resume"')
        for job_id in places(root)["done"]
    )
    starts = sum(len(attempts.numbers(root.run(job_id))) for job_id in places(root)["done"])
    record_property("measured", f"{sum(done.values())} kills ({dict(done)}), {starts} starts of {REAL_JOBS} jobs, {resumed} "
                                f"resumed from a checkpoint, {released} released; all adapters byte-equal")  # fmt: skip
    assert adapters(root) == adapters(calm)
    assert len(adapters(root)) == REAL_JOBS
    assert resumed > 0
