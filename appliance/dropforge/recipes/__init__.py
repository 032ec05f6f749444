"""Training methods, one file each. `train` picks the recipe of a method; job.py calls nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dropforge.recipes.inputs import TrainingInputs
    from dropforge.trl_adapter import TrainingSummary


def recipe(method: str) -> Callable[[TrainingInputs], TrainingSummary]:
    """The function that trains by `method`. releases.py has refused what is not here before a job starts."""
    from dropforge.recipes import sft

    return {"sft": sft.train, "cpt": sft.train}[method]
