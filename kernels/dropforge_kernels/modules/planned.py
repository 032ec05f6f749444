"""A memory plan put into an engine, and taken back one step when memory turns out to be short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from dropforge_kernels.modules.memory_plan import MemoryPlan, step_back
from dropforge_kernels.modules.offload import HostStore
from dropforge_kernels.modules.policy import Keep

RETREAT = 0.95
"""Of the last plan's peak: what the next one may need at most, when the driver reports enough free memory after all."""


class Engine(Protocol):
    """What is planned: ``patch.engine.Engine`` or ``causal_lm.Decoder``."""

    def set_policies(
        self, policies: Sequence[Keep], *, mlp_tile: int | None = None, store: HostStore | None = None
    ) -> None: ...


def apply_plan(engine: Engine, plan: MemoryPlan) -> None:
    """Set every layer's policy, with a host store if the plan has one."""
    store = HostStore(capacity=plan.host_bytes, depth=plan.store_depth) if plan.host_bytes else None
    engine.set_policies(plan.policies, mlp_tile=plan.mlp_tile, store=store)


def usable_memory(device: torch.device | None = None) -> int:
    """Bytes this process may allocate in all: what it holds and what the driver has free, within its own limit."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(allowed, free + torch.cuda.memory_reserved(device))


def retreat(engine: Engine, plan: MemoryPlan, *, usable: int) -> MemoryPlan:
    """After torch.OutOfMemoryError: the next plan that needs less and fits ``usable`` bytes, set in the engine.

    Call it outside the except block (its traceback keeps the failed step's tensors alive), after
    ``torch.cuda.empty_cache()``; gradients of the failed step must be taken back by the caller. ``lines()`` of the new
    plan says why. Raises ValueError when nothing smaller fits: the batch must shrink.
    """
    smaller = step_back(plan, budget=min(usable, int(RETREAT * plan.predicted_peak)))
    if not smaller.fits:
        raise ValueError(smaller.lines()[-1].strip())
    apply_plan(engine, smaller)
    return smaller
