"""What every recipe gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dropforge.checkpoints import CheckpointStore
from dropforge.data import PreparedData
from dropforge.events import RunLog
from dropforge.plan import Plan
from dropforge.spec import Spec
from dropforge.stop import StopSignal

if TYPE_CHECKING:
    from dropforge_kernels.patch.session import Session
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """Everything a training needs, ready: the model with its adapter attached, rows tokenised and labelled."""

    spec: Spec
    plan: Plan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    store: CheckpointStore
    log: RunLog
    stop: StopSignal
    kernels: Session | None = None
    """The open session whose operations run inside the model; None on a CPU."""
