"""Dropforge's operations inside the model of a job, and what every layer keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from dropforge_kernels.modules.host_memory import host_available
from dropforge_kernels.modules.memory_plan import MemoryPlan, plan_memory
from dropforge_kernels.modules.model_shape import Training, model_shape
from dropforge_kernels.modules.planned import apply_plan, retreat, usable_memory
from dropforge_kernels.patch.session import Session, open_session
from torch import nn

from dropforge.events import RunLog
from dropforge.plan import Plan

SHARE = 0.9
"""Of the usable memory that a plan may take; evaluation and the first runs of other bucket shapes need some too."""
HOST_SHARE = 0.5
"""Of the free host memory that layer inputs may take."""


@contextmanager
def kernels_in(model: nn.Module, plan: Plan, log: RunLog) -> Iterator[Session | None]:
    """On a GPU the block runs with the operations inside ``model``; every swap and skip becomes an event."""
    if plan.device != "cuda":
        yield None
        return
    session = open_session(model)
    for line in session.report.lines():
        log.event("engine", text=line)
    try:
        yield session
    finally:
        for why, count in session.report.declined.items():
            log.event("engine", text=f"{count} forwards took the model's own path: {why}")
        session.close()


def plan_layers(session: Session, model: nn.Module, *, tokens: int, document: int, optimizer: str) -> MemoryPlan | None:
    """Decide from the memory that is free now what each layer keeps, and tell the engine.

    None without an engine (transformers' own gradient checkpointing then decides), or when somebody has planned
    already. Call it before gradients and optimizer states exist. tokens: of a full bucket. document: mean length.
    """
    engine = session.engine
    if engine is None or engine.planned:
        return None
    config: Any = model.config
    shape = model_shape(config.to_dict())
    made = plan_memory(
        shape,
        Training(weights=_weights(model), ranks=_ranks(model), optimizer=optimizer, gradients_stay=True),
        tokens=tokens,
        document=document,
        budget=int(SHARE * usable_memory()),
        host=int(HOST_SHARE * host_available()),
        resident=torch.cuda.memory_allocated(),
        tiled=engine.tiled_mlp,
    )
    apply_plan(engine, made)
    return made


def graph_line(plan: MemoryPlan) -> str:
    """What captured buckets take of a plan's memory.

    They share one pool as large as the activations of the largest, and keep it between steps; a shape's first run is
    eager and needs as much beside it.
    """
    size, room = plan.predicted.activations, plan.request.budget - plan.predicted_peak
    line = f"memory: captured buckets share {size / 2**30:.1f} GiB, which they keep"
    if room >= size:
        return f"{line}; there is room for as much beside them"
    return f"{line}; a bucket shape that comes for the first time makes them give it up for a moment"


def smaller_plan(session: Session, plan: MemoryPlan) -> MemoryPlan | None:
    """After torch ran out of memory: the next plan, in the engine; None when nothing smaller fits."""
    if session.engine is None:
        return None
    try:
        return retreat(session.engine, plan, usable=int(SHARE * usable_memory()))
    except ValueError:
        return None


def _weights(model: nn.Module) -> str:
    if any(getattr(parameter, "quant_state", None) is not None for parameter in model.parameters()):
        return "nf4"
    frozen = next(parameter for parameter in model.parameters() if parameter.dim() > 1 and not parameter.requires_grad)
    return "fp32" if frozen.dtype is torch.float32 else "bf16"


def _ranks(model: nn.Module) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "lora_A" in parts:
            projection = parts[parts.index("lora_A") - 1]
            ranks[projection] = max(ranks.get(projection, 0), parameter.shape[0])
    return ranks
