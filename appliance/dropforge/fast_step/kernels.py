"""Dropforge's operations inside the model of a job, and what every layer keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from dropforge_kernels.modules.host_memory import host_available
from dropforge_kernels.modules.memory_plan import MemoryPlan, plan_memory
from dropforge_kernels.modules.model_shape import Training, model_shape
from dropforge_kernels.modules.offload import HostStore
from dropforge_kernels.patch.session import Session, open_session
from torch import nn

from dropforge.events import RunLog
from dropforge.plan import Plan

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
    free, _ = torch.cuda.mem_get_info()
    made = plan_memory(
        shape,
        Training(weights=_weights(model), ranks=_ranks(model), optimizer=optimizer, gradients_stay=True),
        tokens=tokens,
        document=document,
        budget=free + torch.cuda.memory_reserved(),
        host=int(HOST_SHARE * host_available()),
        resident=torch.cuda.memory_allocated(),
    )
    store = HostStore(capacity=made.host_bytes, depth=made.store_depth) if made.host_bytes else None
    engine.set_policies(made.policies, mlp_tile=made.mlp_tile, store=store)
    return made


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
