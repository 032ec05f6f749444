"""The packing order a checkpoint was written under, so that a resumed run continues exactly that order or says no.

(epoch, step) is the whole state of the order; transformers' trainer keeps it as global_step. What must be equal besides
is what the order was made from.
"""

from __future__ import annotations

import json
from pathlib import Path

from dropforge.errors import TrainingError
from dropforge.packing.feed import Feeder

NAME = "packing_order.json"

Order = dict[str, str | int]


def order_of(feeder: Feeder) -> Order:
    """What decides the order."""
    plan = feeder.plan
    return {
        "documents": feeder.rows.fingerprint(),
        "mode": str(plan.mode),
        "per_step": plan.per_step,
        "per_micro": plan.per_micro,
        "budget": plan.buckets.budget,
        "most": plan.buckets.most,
        "seed": plan.seed,
        "steps": feeder.steps,
    }


def write_order(folder: Path, order: Order) -> None:
    """Beside the checkpoint's other files."""
    (folder / NAME).write_text(json.dumps(order, sort_keys=True))


def check_order(folder: Path, order: Order) -> None:
    """Raises TrainingError train-order when the checkpoint in ``folder`` was written under another order."""
    path = folder / NAME
    if not path.exists():
        raise _other(folder, "it was not written by a packed training")
    saved = json.loads(path.read_text())
    changed = [f"{name} was {saved.get(name)}, is {value}" for name, value in order.items() if saved.get(name) != value]
    if changed:
        raise _other(folder, "; ".join(changed))


def _other(folder: Path, why: str) -> TrainingError:
    return TrainingError(
        f"{folder.name} cannot be continued: the documents would come in another order",
        code="train-order",
        where=str(folder.name),
        why=why,
        fix="use the data, seed, batch size and packing of the run that wrote it, or start anew",
    )
