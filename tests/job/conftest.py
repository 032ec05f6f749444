"""Real jobs on tiny models, in this process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dropforge.events import RunLog
from dropforge.files import read_json, read_json_lines, sha256_file
from dropforge.paths import DataRoot, ResultFolder, RunFolder
from dropforge.spec_check import check, to_yaml
from dropforge.states import State
from dropforge.stop import StopSignal

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": str(a + b)}]}
    for a in range(4) for b in range(5)
]  # fmt: skip


@dataclass
class Bench:
    """A data root with one data file, and a way to run jobs in it."""

    root: DataRoot
    made: int = 0
    logs: list[RunLog] = field(default_factory=list)

    def run_folder(self, text: str) -> RunFolder:
        """A run as intake would leave it."""
        self.made += 1
        checked = check(text.encode(), filename="job.yaml")
        run = self.root.run(f"{self.made:06d}-{checked.spec.slug}-00000000")
        run.path.mkdir(parents=True)
        run.spec_original.write_text(text)
        run.spec_resolved.write_text(to_yaml(checked.resolved))
        return run

    def go(self, run: RunFolder, *, stop: StopSignal | None = None, log: RunLog | None = None) -> State:
        from dropforge.job import run_job

        log = log or RunLog(run)
        self.logs.append(log)
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # what libraries warn about is theirs
            return run_job(run, root=self.root, attempt=1, log=log, stop=stop or StopSignal())

    def result(self, run: RunFolder) -> ResultFolder:
        name = run.id.partition("-")[2].rpartition("-")[0]
        return self.root.result(name, run.id)

    def adapter_hash(self, run: RunFolder) -> str:
        return sha256_file(self.result(run).adapter / "adapter_model.safetensors")

    def provenance(self, run: RunFolder) -> dict:
        return read_json(self.result(run).provenance)

    def events(self, run: RunFolder, action: str) -> list[dict]:
        return [event for event in read_json_lines(run.events) if event["action"] == action]


def spec(*, name: str = "sums", model: str = "builtin:tiny-llama", data: str = "sums.jsonl", train: str = "max_steps: 6",
         extra: str = "", export: str = "adapter") -> str:  # fmt: skip
    return (
        f"version: 1\nname: {name}\nmodel: {model}\ndata: {data}\n"
        f"train: {{learning_rate: 1e-3, effective_batch_size: 4, {train}}}\n{extra}\nexport: [{export}]\n"
    )


@pytest.fixture
def make_spec() -> Callable[..., str]:
    return spec


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    root = DataRoot(tmp_path / "data").create()
    (root.datasets / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Bench(root)
