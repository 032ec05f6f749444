"""What each decoder layer will keep on the GPU, before the model is loaded: the engine's planner on a job's numbers."""

from __future__ import annotations

import math

from dropforge_kernels.modules.memory_plan import CUDA_CONTEXT, MemoryPlan, plan_memory
from dropforge_kernels.modules.model_shape import PROJECTIONS, Training

from dropforge.facts import ModelFacts
from dropforge.spec import Spec

HOST_SHARE = 0.8
"""Of the available host memory: what may hold layer inputs."""
WEIGHTS = {"float32": "fp32", "bfloat16": "bf16", "nf4": "nf4"}


def layer_plan(
    spec: Spec, model: ModelFacts, *, weight_dtype: str, optim: str, tokens: int, free: int, host: int
) -> MemoryPlan | None:
    """The plan for LoRA on one GPU; None where the engine's layers do not run or the model's sizes are not known.

    tokens: of one micro-batch. free: bytes free on the GPU now. host: bytes of host memory available.
    """
    adapter = spec.adapter
    if model.shape is None or adapter.type == "full" or adapter.lora_dropout or adapter.use_dora:
        return None
    chosen = PROJECTIONS if adapter.target_modules == "all-linear" else adapter.target_modules
    training = Training(
        weights=WEIGHTS[weight_dtype],
        ranks={name: adapter.r for name in chosen if name in PROJECTIONS},
        optimizer=optim,
        gradients_stay=True,
    )
    return plan_memory(
        model.shape,
        training,
        tokens=tokens,
        document=min(tokens, spec.model.max_seq_length),
        budget=max(1, free - CUDA_CONTEXT - saved_modules_bytes(spec, model)),
        host=int(host * HOST_SHARE),
    )


def saved_modules_bytes(spec: Spec, model: ModelFacts) -> int:
    """Modules trained whole beside LoRA: a copy in fp32, its gradient, AdamW's states in 8 bits."""
    if model.embedding_shape is None:
        return 0
    return len(spec.adapter.modules_to_save) * math.prod(model.embedding_shape) * (4 + 4 + 2)


def whole_bytes(plan: MemoryPlan, spec: Spec, model: ModelFacts) -> int:
    """All that the process takes on the GPU, its CUDA context included."""
    return plan.predicted_peak + CUDA_CONTEXT + saved_modules_bytes(spec, model)
