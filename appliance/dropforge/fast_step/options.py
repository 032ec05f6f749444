"""How to train fast, and the trainer's arguments as the fast step needs them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FastOptions:
    """How to train fast."""

    packing: str | bool = "auto"
    """See packing.choose."""
    budget: int | None = None
    """Tokens of a full bucket; None chooses."""
    rows_per_step: int | None = None
    """Buckets of a step with packing=True, as TRL counts; None: as many as hold the documents of a step."""
    capture: bool = True
    """CUDA graphs where they can be had."""
    compile: bool | None = None
    """Decoder layers through torch.compile for buckets that cannot be captured; None: on a GPU."""


def for_whole_steps(training: Any, documents: int) -> Any:
    """A copy of transformers' TrainingArguments in which a batch is an optimizer step of so many documents."""
    args = copy.copy(training)
    args.per_device_train_batch_size = documents
    args.gradient_accumulation_steps = 1
    args.logging_nan_inf_filter = False  # it waits for every step's loss; a NaN should be seen anyway
    return args
