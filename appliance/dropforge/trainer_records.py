"""What a checkpoint says about its run, so that training goes on from it only where that is the same run."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from dropforge.errors import CommandError
from dropforge.fast.state import state_of

RUN_FILE = "dropforge_run.json"
_SAMPLED = 50
# Field of the record -> (argument to change, what to do).
FIXES = {
    "model": ("model", "load the model that the checkpoint was trained on"),
    "trained": ("get_peft_model", "give the adapter the same rank, targets and modules_to_save as then"),
    "optimizer": ("optim, embedding_learning_rate", "set both as then"),
    "rows": ("train_dataset", "give the same rows in the same order as then"),
    "data": ("train_dataset", "give the same rows in the same order as then"),
}
WORDS = {"model": "the models", "trained": "the trained weights", "optimizer": "the optimizers",
         "rows": "the numbers of rows", "data": "the rows"}  # fmt: skip


def run_record(trainer: Any) -> dict[str, Any]:
    """JSON form of what must be equal for a run to go on: model, trained parameters, optimizer, data."""
    model, args = trainer.model, trainer.args
    state = state_of(model)
    trained = sorted((name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    apart = getattr(args, "embedding_learning_rate", None) is not None
    return {
        "model": state.source.id if state else type(model).__name__,
        "trained": f"{sum(math.prod(shape) for _, shape in trained)} values in {len(trained)} tensors, "
        f"names and shapes {_digest(trained)}",
        "optimizer": f"{args.optim}{' with its own embedding rate' if apart else ''}",
        **_data(trainer.train_dataset),
    }


def _data(dataset: Any) -> dict[str, Any]:
    """Rows and a digest of the first and last ones; nothing for a stream."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list):
        return {}
    count = len(dataset)
    picked = sorted({*range(min(count, _SAMPLED)), *range(max(0, count - _SAMPLED), count)})
    kept = [name for name in ("input_ids", "labels", "prompt", "chosen") if name in columns]
    rows = dataset.select(picked).select_columns(kept) if kept else []
    return {"rows": count, "data": _digest([dict(row) for row in rows])}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()[:16]


def find_checkpoint(asked: str | Path | bool | None, *, output_dir: str) -> Path | None:
    """The folder meant by resume_from_checkpoint; None for no resuming. Raises CommandError api-no-checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint

    if not asked:
        return None
    if asked is True:
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        folder = Path(last) if last else None
    else:
        folder = Path(asked)
    if folder is None or not (folder / "trainer_state.json").is_file():
        raise CommandError(
            f"there is no checkpoint in {output_dir if asked is True else asked}", code="api-no-checkpoint",
            where="resume_from_checkpoint",
            fix="leave it out to start from the beginning, or name a folder checkpoint-N of this run",
        )  # fmt: skip
    return folder


def check_same_run(folder: Path, trainer: Any) -> None:
    """The checkpoint's record against this trainer; a checkpoint without one is left to transformers.

    Raises CommandError api-other-run, before anything is loaded.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return
    then: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    now = run_record(trainer)
    for name, (argument, fix) in FIXES.items():
        if name in then and name in now and then[name] != now[name]:
            raise CommandError(
                f"{folder.name} is a checkpoint of another run: {WORDS[name]} differ", code="api-other-run",
                where=f"resume_from_checkpoint, {argument}", why=f"then {then[name]}, now {now[name]}",
                fix=f"{fix}; or load the checkpoint as an adapter, from_pretrained({str(folder)!r}), and start anew",
            )  # fmt: skip


def write_record(trainer: Any, folder: Path) -> None:
    """Beside the checkpoint's other files."""
    if folder.is_dir():
        (folder / RUN_FILE).write_text(json.dumps(run_record(trainer), indent=2) + "\n", encoding="utf-8")
