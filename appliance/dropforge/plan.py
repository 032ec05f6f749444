"""From a resolved spec and what is known of machine, model and data to every derived number. Pure; no torch.

Sizes are bytes. Estimates carry their formula in a comment; the job later records what was really used beside them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dropforge.facts import DataFacts, ModelFacts
from dropforge.hardware import GIB, Hardware
from dropforge.plan_memory import layer_plan, whole_bytes
from dropforge.spec import Spec

CHECKPOINTS_KEPT = 2
SMALL_MODEL = 50_000_000
PACKED_TOKENS = 8192
"""Of a full bucket: enough to keep a large GPU busy with a small model."""
RUNTIME_BYTES = {"cpu": int(1.0 * GIB), "cuda": int(1.5 * GIB)}
"""Interpreter and libraries; on a GPU the CUDA context and workspaces."""
BYTES_PER_PARAMETER = {"float32": 4.0, "bfloat16": 2.0, "nf4": 4.127 / 8}
OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "adafactor": 1, "sgd": 0}
GGUF_BITS = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.56, "q5_k_m": 5.7, "q5_k_s": 5.57, "q5_0": 5.57,
    "q5_1": 6.06, "q4_k_m": 4.89, "q4_k_s": 4.67, "q4_0": 4.64, "q4_1": 5.1, "iq4_nl": 4.68, "iq4_xs": 4.46,
    "q3_k_l": 4.3, "q3_k_m": 4.0, "q3_k_s": 3.64, "iq3_m": 3.76, "iq3_s": 3.66, "iq3_xs": 3.5, "iq3_xxs": 3.37,
    "q2_k": 3.16, "q2_k_l": 3.6, "iq2_m": 2.93, "iq2_s": 2.74, "iq2_xs": 2.59, "iq2_xxs": 2.38, "iq1_m": 2.15,
    "iq1_s": 2.0, "tq1_0": 2.19, "tq2_0": 2.52,
}  # fmt: skip
"""Whole-file bits per weight of an 8B model, measured with llama-quantize --dry-run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number the job derives from its spec, fixed before anything heavy starts; saved as plan.json."""

    device: str
    weight_dtype: str
    """dtype the base weights are loaded in; `nf4` when they are quantised."""
    compute_dtype: str
    cpu_threads: int
    """Threads of CPU arithmetic. One for small models: nothing to gain, and the bytes do not depend on the machine."""
    optim: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_seq_length: int
    token_budget: int
    """Tokens of a full packed bucket on a GPU; 0 where rows are padded instead."""
    gradient_checkpointing: bool
    """Layers are computed again in the backward where nothing finer is planned for them."""
    rows: int | None
    steps: int | None
    parameters: int | None
    trainable_parameters: int | None
    memory_needed: int | None
    memory_available: int
    memory_lines: tuple[str, ...]
    """What each layer keeps for its backward, in words; empty where the engine's layers do not run."""
    disk_needed: int | None
    disk_free: int
    kernels: str
    exports: tuple[str, ...]
    notes: tuple[str, ...]
    """Choices a user should know about: fallbacks with their reason, guesses, things that will not fit."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(spec: Spec, *, hardware: Hardware, model: ModelFacts, data: DataFacts) -> Plan:
    """`spec` must be resolved (spec_defaults.resolve)."""
    notes: list[str] = []
    device = hardware.device
    weight_dtype, compute_dtype = _dtypes(spec, device)
    optim = _optimizer(spec, device, notes)
    trainable = _trainable(spec, model)
    disk = _disk(spec, model, trainable, optim)
    available = max((gpu.memory_free for gpu in hardware.gpus), default=hardware.memory_available)
    budget = _token_budget(spec, device)
    layers = None
    if device == "cuda":
        layers = layer_plan(
            spec, model, weight_dtype=weight_dtype, optim=optim, tokens=budget, free=available,
            host=hardware.memory_available,
        )  # fmt: skip
    memory = (
        whole_bytes(layers, spec, model) if layers else _memory(spec, model, weight_dtype, trainable, optim, device)
    )
    if device == "cpu":
        notes.append(f"training on the CPU: {hardware.gpu_note}")
        if spec.data.packing is True:
            notes.append("packing is off on the CPU: rows are padded there")
    if data.missing:
        notes.append(f"data not found: {', '.join(data.missing)}")
    if model.parameters is None:
        notes.append("memory and disk cannot be estimated before the model is here")
    if memory and memory > available:
        notes.append(f"may not fit: about {memory / GIB:.1f} GiB needed, {available / GIB:.1f} GiB available")
    if disk and disk > hardware.disk_free:
        notes.append(f"disk too small: about {disk / GIB:.1f} GiB needed, {hardware.disk_free / GIB:.1f} GiB free")
    assert spec.train.per_device_train_batch_size and spec.train.gradient_accumulation_steps, "resolve() fills these"
    return Plan(
        device=device,
        weight_dtype=weight_dtype,
        compute_dtype=compute_dtype,
        cpu_threads=1 if (model.parameters or 0) < SMALL_MODEL else hardware.cpu_cores,
        optim=optim,
        per_device_train_batch_size=spec.train.per_device_train_batch_size,
        gradient_accumulation_steps=spec.train.gradient_accumulation_steps,
        max_seq_length=spec.model.max_seq_length,
        token_budget=budget,
        gradient_checkpointing=device == "cuda" and _recompute(spec, model, weight_dtype, trainable, available, budget),
        rows=data.rows,
        steps=_steps(spec, data.rows),
        parameters=model.parameters,
        trainable_parameters=trainable,
        memory_needed=memory,
        memory_available=available,
        memory_lines=tuple(layers.lines()) if layers else (),
        disk_needed=disk,
        disk_free=hardware.disk_free,
        kernels=_kernels(spec, device),
        exports=spec.export,
        notes=tuple(notes),
    )


def _kernels(spec: Spec, device: str) -> str:
    if device == "cpu":
        return "PyTorch's own"
    packing = "packed where it pays"
    if spec.data.packing != "auto":
        packing = "packed into full buckets" if spec.data.packing else "rows without padding"
    return f"Dropforge's where the model allows, else PyTorch's; {packing}, steps captured as CUDA graphs"


def _token_budget(spec: Spec, device: str) -> int:
    """A bucket holds the longest row; buckets are cut in eighths of multiples of 128 tokens."""
    return 0 if device == "cpu" else -(-max(PACKED_TOKENS, spec.model.max_seq_length) // 1024) * 1024


def _recompute(
    spec: Spec, model: ModelFacts, weight_dtype: str, trainable: int | None, available: int, budget: int
) -> bool:
    """Whether what a bucket's backward needs would take more than is left beside weights and states."""
    if model.parameters is None or not model.hidden_size or not model.num_layers:
        return True
    fixed = model.parameters * BYTES_PER_PARAMETER[weight_dtype] + (trainable or 0) * 16 + RUNTIME_BYTES["cuda"]
    full = 2 if spec.adapter.type == "full" else 1  # autocast keeps copies of fp32 weights
    activations = 34 * budget * model.hidden_size * model.num_layers * full
    return bool(fixed + activations > 0.8 * available)


def _dtypes(spec: Spec, device: str) -> tuple[str, str]:
    compute = "float32" if device == "cpu" else "bfloat16"
    if spec.model.quantization == "nf4":
        return "nf4", compute
    # Every trained weight needs fp32 to take small updates; frozen ones serve in the compute dtype.
    return ("float32" if spec.adapter.type == "full" else compute), compute


def _optimizer(spec: Spec, device: str, notes: list[str]) -> str:
    """Paged optimizers live in CUDA's managed memory; their plain forms run anywhere."""
    asked = spec.train.optim
    if device == "cpu" and asked.startswith("paged_"):
        plain = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}[asked]
        notes.append(f"optimizer {asked} needs a GPU; {plain} does the same arithmetic here")
        return plain
    return asked


def _trainable(spec: Spec, model: ModelFacts) -> int | None:
    if model.parameters is None:
        return None
    if spec.adapter.type == "full":
        return model.parameters
    # LoRA: r x (in + out) per matrix. Named target_modules are a part of all-linear, so this is an upper bound then.
    lora = sum(spec.adapter.r * (out + inside) for out, inside in model.linear_shapes)
    if not model.linear_shapes:
        return None
    saved = sum(math.prod(model.embedding_shape) for _ in spec.adapter.modules_to_save) if model.embedding_shape else 0
    return lora + saved


def _steps(spec: Spec, rows: int | None) -> int | None:
    """Optimizer steps; None when the number of rows is only known after reading."""
    if spec.train.max_steps:
        return spec.train.max_steps
    if rows is None:
        return None
    evaluation = spec.data.eval.fraction if spec.data.eval and spec.data.eval.fraction else 0.0
    train_rows = rows - round(rows * evaluation)
    per_epoch = math.ceil(train_rows / (spec.train.effective_batch_size or 1))
    return math.ceil(per_epoch * (spec.train.num_train_epochs or 1.0))


def _memory(
    spec: Spec, model: ModelFacts, weight_dtype: str, trainable: int | None, optim: str, device: str
) -> int | None:
    """Weights + trained parameters (fp32 value, gradient, optimizer state) + kept activations + runtime."""
    if model.parameters is None:
        return None
    weights = model.parameters * BYTES_PER_PARAMETER[weight_dtype]
    state = (trainable or 0) * (4 + 4 + OPTIMIZER_BYTES.get(optim, 8))
    tokens = (spec.train.per_device_train_batch_size or 1) * spec.model.max_seq_length
    # 34 bytes x hidden per token and layer: what a layer keeps for backward in 16 bit (Korthikanti et al. 2022).
    activations = 34 * tokens * (model.hidden_size or 0) * (model.num_layers or 0) * (2 if device == "cpu" else 1)
    return int(weights + state + activations + RUNTIME_BYTES[device])


def _disk(spec: Spec, model: ModelFacts, trainable: int | None, optim: str) -> int | None:
    """Download + checkpoints x (kept + the one being written) + merged 16-bit + 16-bit GGUF + each GGUF asked for."""
    if model.parameters is None:
        return None
    sixteen_bit = model.parameters * 2
    total = 0 if model.on_disk else sixteen_bit
    total += (trainable or 0) * (4 + OPTIMIZER_BYTES.get(optim, 8)) * (CHECKPOINTS_KEPT + 1)
    if any(entry != "adapter" for entry in spec.export):
        total += sixteen_bit
    if spec.gguf_types or "ollama" in spec.export:
        total += sixteen_bit
    # Bits of the linear layers; embeddings stay in 16, so this is a lower bound for small models. An adapter's GGUF is
    # f32, and is tried on a 16-bit GGUF of the base model that goes again.
    bits = {"fp8": 8.0, "fp8:block": 8.0, "fp8:static": 8.0, "merged_4bit": 4.127, "lora_gguf": 16.0}
    total += int(sum(model.parameters * bits.get(entry, 0) / 8 for entry in spec.export))
    total += (trainable or 0) * 4 if "lora_gguf" in spec.export else 0
    return int(total + sum(model.parameters * GGUF_BITS.get(kind, 16) / 8 for kind in spec.gguf_types))
