"""Our model for the benchmark: ``patched(model)`` around a plain PEFT model, under a fixed policy or the planner's."""

from __future__ import annotations

import torch
from dropforge_kernels.modules import fa4
from dropforge_kernels.modules.host_memory import host_available
from dropforge_kernels.modules.memory_peak import ADAPTER_BYTES, Counts, peak
from dropforge_kernels.modules.memory_plan import MemoryPlan, plan_memory, policies_of
from dropforge_kernels.modules.model_shape import ModelShape, Training, model_shape
from dropforge_kernels.modules.offload import HostStore
from dropforge_kernels.modules.planned import retreat, usable_memory
from dropforge_kernels.modules.policy import Keep
from dropforge_kernels.patch.session import open_session
from torch import nn

from steps.engines import Loaded
from steps.models import CUDNN, RANK, BatchShape

GIB = 1 << 30
HOST_SHARE = 0.8
"""Of the host memory that is free: what may be pinned."""
TILE, TILED_FROM = 16384, 65536
"""Rows of the MLP at a time under the fixed policies, for batches of so many tokens and more."""
OPERATIONS = ("rms_norm", "swiglu", "rope", "linear_cross_entropy")
CPU_BUDGET = 8 * GIB


def prepared(model: nn.Module, *, setting: str, weights: str, device: str) -> Loaded:
    """Opens the session; ``prepare`` sets the layers' policies for a shape and reports them."""
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
    resident = torch.cuda.memory_allocated() if device == "cuda" else None
    planner = _Planner(model_shape(model.config.to_dict()), weights=weights, device=device, resident=resident)
    engine = session.engine

    steal: list[torch.Tensor] = []

    def prepare(shape: BatchShape) -> dict[str, object]:
        steal.clear()
        engine.set_policies([Keep.NONE] * len(engine.decoder.layers))  # lets go of the last shape's host memory first
        if device == "cuda":
            getattr(torch._C, "_host_emptyCache", lambda: None)()
        name = loaded.setting.removesuffix(CUDNN)
        fa4.switch(name == loaded.setting)
        policies, tile, columns = planner.choose(name, shape)
        store = None
        if any(keep.on_host for keep in policies):
            store = HostStore(depth=2 if Keep.OFFLOAD_OUTPUT in policies else 1)
            store.reserve(int(float(str(columns["host_store_gib"])) * GIB), torch.device(device))
        engine.set_policies(policies, mlp_tile=tile, store=store)
        if loaded.steal_gib and name == "planner":
            steal.append(torch.empty(int(loaded.steal_gib * GIB), dtype=torch.uint8, device=device))
        return columns

    def back() -> dict[str, object] | None:
        if planner.plan is None or loaded.setting.removesuffix(CUDNN) != "planner":
            return None
        taken = sum(tensor.nbytes for tensor in steal)
        try:
            planner.plan = retreat(engine, planner.plan, usable=planner.budget() - taken)
        except ValueError as error:
            print(error, flush=True)
            return None
        print("\n".join(planner.plan.lines()), flush=True)
        return planner.columns_of_plan()

    loaded.retreat = back
    loaded.prepare = prepare
    # Every row's last label is not learnt; who builds the batch knows how many are.
    loaded.extra = lambda shape: {"max_valid": shape.batch * (shape.length - 1)}
    return loaded


class _Planner:
    def __init__(self, shape: ModelShape, *, weights: str, device: str, resident: int | None) -> None:
        self.shape, self.device, self.resident = shape, device, resident
        kind = "nf4" if weights.startswith("nf4") else "fp32" if weights.endswith("fp32") else "bf16"
        self.training = Training.of_rank(RANK, weights=kind)
        self.plan: MemoryPlan | None = None

    def choose(self, setting: str, batch: BatchShape) -> tuple[list[Keep], int | None, dict[str, object]]:
        """(policies, MLP tile, columns)."""
        if setting == "planner":
            self.plan = self._plan(batch)
            print("\n".join(self.plan.lines()), flush=True)
            return list(self.plan.policies), self.plan.mlp_tile, self.columns_of_plan()
        counts = _fixed(setting, self.shape.layers)
        tile = TILE if batch.tokens >= TILED_FROM else None
        policies = list(policies_of(counts))
        row = batch.length if batch.batch == 1 else 0
        found = peak(self.shape, self.training, counts, tokens=batch.tokens, tile=tile, row=row)
        total = found.total
        if self.resident is not None:
            total += self.resident - ADAPTER_BYTES * self.training.trained_values(self.shape) - found.weights
        return policies, tile, self._columns(total, found.host, policies)

    def _plan(self, batch: BatchShape) -> MemoryPlan:
        host = int(host_available() * HOST_SHARE)
        return plan_memory(
            self.shape, self.training, tokens=batch.tokens, document=batch.length, budget=self.budget(), host=host,
            resident=self.resident,
        )  # fmt: skip

    def budget(self) -> int:
        """What this process may allocate in all."""
        return usable_memory() if self.device == "cuda" else CPU_BUDGET

    def columns_of_plan(self) -> dict[str, object]:
        """Of the planner's present plan."""
        assert self.plan is not None
        return self._columns(self.plan.predicted_peak, self.plan.host_bytes, self.plan.policies)

    def _columns(self, total: int, host: int, policies: list[Keep] | tuple[Keep, ...]) -> dict[str, object]:
        counted = ", ".join(f"{policies.count(keep)} {keep}" for keep in Keep if keep in policies)
        return {"memory_plan": counted, "predicted_gib": total / GIB, "host_store_gib": host / GIB}


def _fixed(setting: str, layers: int) -> Counts:
    """Unsloth keeps the last layer's input on the GPU, so ``equal`` does too."""
    return {
        "equal": Counts(offload=layers - 1, recompute=1),
        "lean": Counts(offload_output=layers - 1, output=1),
        "recompute": Counts(recompute=layers),
        "output": Counts(output=layers),
        "attention": Counts(attention=layers),
        "keep": Counts(keep=layers),
    }[setting]
