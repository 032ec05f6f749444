"""Optimizer steps as a DataLoader, so that transformers' Trainer counts, skips and resumes as it always does.

One item is one optimizer step (a StepBatch), so the trainer's own accumulation is 1.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset

from dropforge.packing.collate import StepBatch
from dropforge.packing.feed import Feeder


class StepDataset(Dataset[StepBatch]):
    """The steps of the feeder's current epoch; asked for in order they come out of a thread that works ahead."""

    def __init__(self, feeder: Feeder) -> None:
        self.feeder = feeder

    def __len__(self) -> int:
        return self.feeder.steps

    def __getitem__(self, step: int) -> StepBatch:
        return self.feeder.step(self.feeder.epoch, step)


def step_loader(feeder: Feeder) -> DataLoader[Any]:
    """A DataLoader over StepDataset, in order, one step at a time, in this process."""
    return DataLoader(StepDataset(feeder), batch_size=1, shuffle=False, collate_fn=_only, num_workers=0)


def _only(batch: list[StepBatch]) -> StepBatch:
    return batch[0]
