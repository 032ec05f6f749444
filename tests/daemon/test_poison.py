"""Files that run code when they are opened: a checkpoint, a tokenizer's template. Never run (test 29).

The checkpoint is attacked as whoever may write to the data root could: its manifest fits. Slow: real trainings.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from dropforge.checkpoints import MANIFEST, CheckpointStore
from dropforge.errors import DropforgeError, JobStopped, Reason
from dropforge.events import RunLog
from dropforge.files import read_json, regular_files, sha256_file, write_json
from dropforge.job import run_job
from dropforge.paths import DataRoot, RunFolder
from dropforge.spec_check import check, to_yaml
from dropforge.stop import StopSignal

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "owned"


def new_run(root: DataRoot, *, model: str = "builtin:tiny-llama") -> RunFolder:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}]}
        for n in range(12)
    ]
    (root.datasets / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (f"version: 1\nname: poison\nmodel: {model}\ndata: rows.jsonl\n"
            "train: {max_steps: 6, effective_batch_size: 4}\nexport: [adapter]\n")  # fmt: skip
    run = root.run("000001-poison-00000000")
    run.path.mkdir(parents=True)
    run.spec_original.write_text(text)
    run.spec_resolved.write_text(to_yaml(check(text.encode(), filename="job.yaml").resolved))
    return run


class StopAt(RunLog):
    def __init__(self, run: RunFolder, stop: StopSignal) -> None:
        super().__init__(run)
        self.stop = stop

    def metrics(self, **values) -> None:
        super().metrics(**values)
        if values.get("step") == 3:
            self.stop.request(Reason.SHUTDOWN)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_poisoned_part_of_a_checkpoint_is_not_opened(root: DataRoot, marker: Path, name: str) -> None:
    run, stop = new_run(root), StopSignal()
    with pytest.raises(JobStopped):
        run_job(run, root=root, attempt=1, log=StopAt(run, stop), stop=stop)
    (newest,) = CheckpointStore(run.checkpoints).all()
    if not (newest.path / name).exists():
        pytest.skip(f"this trainer writes no {name}")
    (newest.path / name).write_bytes(pickle.dumps(Touch(marker)))
    files = {str(path.relative_to(newest.path)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
             for path in regular_files(newest.path) if path.name != MANIFEST}  # fmt: skip
    write_json(newest.path / MANIFEST, {**read_json(newest.path / MANIFEST), "files": files})
    assert newest.verify() == ""
    try:
        run_job(run, root=root, attempt=2, log=RunLog(run), stop=StopSignal())
    except Exception as error:  # noqa: BLE001  (whatever a library says: it must not have run the code)
        print(f"refused: {type(error).__name__}: {error}")
    assert not marker.exists()


ATTACKS = [
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
    "{{ messages.__init__.__globals__ }}{{ raise_exception.__globals__['os'].system('touch MARKER') }}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_a_hostile_chat_template_runs_nothing(root: DataRoot, marker: Path, template: str) -> None:
    from dropforge.models.source import resolve_model
    from dropforge.spec import ModelSpec

    built = resolve_model(ModelSpec(id="builtin:tiny-llama"), root=root).path
    folder = root.models / "hostile"
    folder.mkdir()
    for path in regular_files(built):
        (folder / path.name).write_bytes(path.read_bytes())
    config = read_json(folder / "tokenizer_config.json")
    hostile = template.replace("MARKER", str(marker))
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": hostile})
    (folder / "chat_template.jinja").write_text(hostile)
    run = new_run(root, model="hostile")
    try:
        run_job(run, root=root, attempt=1, log=RunLog(run), stop=StopSignal())
    except DropforgeError as error:
        print(f"refused: {error}")
    except Exception as error:  # noqa: BLE001  (as above)
        print(f"refused: {type(error).__name__}: {error}")
    assert not marker.exists()
