"""Our model for the benchmark: ``patched(model)`` around a plain PEFT model, under a fixed policy or the planner's."""

from __future__ import annotations

import psutil
import torch
from dropforge_kernels.modules.memory_peak import Counts, peak
from dropforge_kernels.modules.memory_plan import MemoryPlan, plan_memory
from dropforge_kernels.modules.model_shape import ModelShape, Training, model_shape
from dropforge_kernels.modules.offload import HostStore
from dropforge_kernels.modules.policy import Keep
from dropforge_kernels.patch.session import open_session
from torch import nn

from steps.engines import Loaded
from steps.models import RANK, BatchShape

GIB = 1 << 30
HOST_SHARE = 0.8
"""Of the host memory that is free: what may be pinned."""
TILE, TILED_FROM = 16384, 65536
"""Rows of the MLP at a time under the fixed policies, for batches of so many tokens and more."""
OPERATIONS = ("rms_norm", "swiglu", "rope", "linear_cross_entropy")
CPU_BUDGET = 8 * GIB


def prepared(model: nn.Module, *, setting: str, weights: str, device: str) -> Loaded:
    """Opens the session; ``prepare`` sets the layers' policies for a shape and reports them."""
    resident = torch.cuda.memory_allocated() if device == "cuda" else None
    session = open_session(model, names=OPERATIONS if setting == "ops" else None)
    loaded = Loaded(model, device, setting)
    loaded.stack.callback(session.close)
    print("\n".join(session.report.lines()), flush=True)
    if setting == "ops":
        base = model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
        loaded.prepare = lambda shape: {"memory_plan": "gradient checkpointing"}
        return loaded
    assert session.engine is not None, f"the engine is not in this model: {session.report.engine}"
    planner = _Planner(model_shape(model.config.to_dict()), weights=weights, device=device, resident=resident)
    decoder = session.engine.decoder

    def prepare(shape: BatchShape) -> dict[str, object]:
        decoder.set_policies([Keep.NONE] * len(decoder.layers))  # lets go of the last shape's host memory first
        policies, tile, columns = planner.choose(loaded.setting, shape)
        store = None
        if Keep.OFFLOAD in policies:
            store = HostStore()
            store.reserve(int(float(str(columns["host_store_gib"])) * GIB), torch.device(device))
        decoder.set_policies(policies, mlp_tile=tile, store=store)
        return columns

    loaded.prepare = prepare
    # Every row's last label is not learnt; who builds the batch knows how many are.
    loaded.extra = lambda shape: {"max_valid": shape.batch * (shape.length - 1)}
    return loaded


class _Planner:
    def __init__(self, shape: ModelShape, *, weights: str, device: str, resident: int | None) -> None:
        self.shape, self.device, self.resident = shape, device, resident
        kind = "nf4" if weights.startswith("nf4") else "fp32" if weights.endswith("fp32") else "bf16"
        self.training = Training.of_rank(RANK, weights=kind)

    def choose(self, setting: str, batch: BatchShape) -> tuple[list[Keep], int | None, dict[str, object]]:
        """(policies, MLP tile, columns)."""
        if setting == "planner":
            plan = self._plan(batch)
            print("\n".join(plan.lines()), flush=True)
            return (
                list(plan.policies),
                plan.mlp_tile,
                self._columns(plan.predicted_peak, plan.host_bytes, plan.policies),
            )
        counts = _fixed(setting, self.shape.layers)
        tile = TILE if batch.tokens >= TILED_FROM else None
        order = (Keep.OFFLOAD, Keep.NONE, Keep.ATTENTION, Keep.ALL)
        numbers = (counts.offload, counts.recompute, counts.attention, counts.keep)
        policies = [keep for keep, count in zip(order, numbers, strict=True) for _ in range(count)]
        found = peak(self.shape, self.training, counts, tokens=batch.tokens, tile=tile)
        total = found.total
        if self.resident is not None:
            total += self.resident - 4 * self.training.trained_values(self.shape) - found.weights
        return policies, tile, self._columns(total, found.host, policies)

    def _plan(self, batch: BatchShape) -> MemoryPlan:
        host = int(psutil.virtual_memory().available * HOST_SHARE)
        return plan_memory(
            self.shape, self.training, tokens=batch.tokens, document=batch.length, budget=self._budget(), host=host,
            resident=self.resident,
        )  # fmt: skip

    def _budget(self) -> int:
        """What this process may allocate in all."""
        if self.device != "cuda":
            return CPU_BUDGET
        free, total = torch.cuda.mem_get_info()
        allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
        return min(allowed, free + torch.cuda.memory_reserved())

    def _columns(self, total: int, host: int, policies: list[Keep] | tuple[Keep, ...]) -> dict[str, object]:
        counted = ", ".join(f"{policies.count(keep)} {keep}" for keep in Keep if keep in policies)
        return {"memory_plan": counted, "predicted_gib": total / GIB, "host_store_gib": host / GIB}


def _fixed(setting: str, layers: int) -> Counts:
    """Unsloth keeps the last layer's input on the GPU, so ``equal`` does too."""
    return {
        "equal": Counts(layers - 1, 1, 0, 0),
        "recompute": Counts(0, layers, 0, 0),
        "attention": Counts(0, 0, layers, 0),
        "keep": Counts(0, 0, 0, layers),
    }[setting]
