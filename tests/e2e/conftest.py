"""The product as its users run it: the `dropforge` command and a real daemon on a data root of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-P", "-m", "dropforge"]
ROWS = [
    {"instruction": f"What is the double of {number}?", "output": str(2 * number)} for number in range(12)
]  # fmt: skip


@dataclass
class Appliance:
    """One data root, its daemon and the command line on it."""

    root: Path
    daemon: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "DROPFORGE_DATA": str(self.root),
            "DROPFORGE_POLL_SECONDS": "0.2",
            "DROPFORGE_SETTLE_SECONDS": "1",
        }

    def start(self) -> None:
        with (self.root / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen(
                [*COMMAND, "watch"], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.wait(lambda: (self.root / "state" / "daemon.json").exists(), "the daemon's heartbeat")

    def stop(self) -> int:
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(timeout=120)

    def kill_everything(self) -> None:
        """kill -9 of the daemon and of every process that belongs to it, as a power cut would."""
        assert self.daemon is not None
        import psutil

        family = [psutil.Process(self.daemon.pid), *psutil.Process(self.daemon.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=20)
        self.daemon.wait(timeout=20)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*COMMAND, *arguments], env=self.environment, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def json(self, *arguments: str):
        return json.loads(self.run(*arguments, "--json").stdout)

    def drop(self, text: str, *, name: str = "job.yaml") -> str:
        """Submit a spec; returns the id of the job made from it."""
        path = self.root.parent / name
        path.write_text(text)
        file = self.json("submit", str(path))["file"]
        jobs: list[dict] = []

        def accepted() -> bool:
            jobs[:] = [job for job in self.json("status") if job["file"] == file]
            return bool(jobs)

        self.wait(accepted, f"{file} to be accepted")
        return jobs[-1]["id"]

    def status(self, job_id: str) -> dict:
        return json.loads((self.root / "runs" / job_id / "status.json").read_text())

    def wait_state(self, job_id: str, *states: str, seconds: float = 120) -> dict:
        self.wait(lambda: self.status(job_id)["state"] in states, f"{job_id} to be {states}", seconds=seconds)
        return self.status(job_id)

    def wait(self, condition: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            log = self.root / "daemon.log"
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{log.read_text()[-3000:]}"
            time.sleep(0.05)


def job(*, name: str, train: str, export: str = "adapter", extra: str = "") -> str:
    return (
        f"version: 1\nname: {name}\nmodel: {{id: 'builtin:tiny-llama', max_seq_length: 128}}\n"
        "adapter: {r: 8, modules_to_save: [embed_tokens, lm_head]}\n"
        f"data: doubles.jsonl\ntrain: {{learning_rate: 3e-3, effective_batch_size: 4, {train}}}\n{extra}\nexport: [{export}]\n"
    )


@pytest.fixture
def make_job() -> Callable[..., str]:
    return job


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    root = tmp_path_factory.mktemp("appliance") / "data"
    (root / "datasets").mkdir(parents=True)
    (root / "datasets" / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    machine = Appliance(root)
    machine.start()
    yield machine
    if machine.daemon is not None and machine.daemon.poll() is None:
        machine.stop()
