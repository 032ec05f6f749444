"""Loads a model with LoRA the way each engine's documentation says, inside that engine's own process."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steps import adapters
from steps.models import CUDNN, PEER_PACKAGES, RANK, TARGETS, BatchShape


@dataclass
class Loaded:
    """A model ready to train. ``prepare(shape)`` is called before each shape and returns columns about its memory;
    ``extra(shape)`` gives arguments that this engine takes beside input_ids and labels. ``setting`` may be changed to
    another of the same engine."""

    model: nn.Module
    device: str
    setting: str = ""
    steal_gib: float = 0.0
    """Taken away after planning, as another process would; only our planner looks at it."""
    prepare: Callable[[BatchShape], dict[str, object]] = field(default=lambda shape: {})
    extra: Callable[[BatchShape], dict[str, object]] = field(default=lambda shape: {})
    retreat: Callable[[], dict[str, object] | None] = field(default=lambda: None)
    """After out of memory: plans for less and returns the new columns; None when it cannot."""
    stack: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        self.stack.close()


def load(engine: str, path: Path, *, weights: str, device: str, longest: int) -> Loaded:
    """``engine`` as in models.ENGINES; ``weights`` nf4, bf16 or (for the reference, in ``hf``'s way) fp32."""
    name, _, setting = engine.partition(":")
    if name == "unsloth":
        loaded = _unsloth(path, weights=weights, longest=longest)
    elif name == "ours":
        from steps.ours import prepared

        model = _plain(path, weights=weights, device=device)
        loaded = prepared(_with_lora(model), setting=setting, weights=weights, device=device)
    else:
        if name == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        loaded = Loaded(_checkpointing(_plain(path, weights=weights, device=device), weights=weights), device)
        loaded.model = _with_lora(loaded.model)
    loaded.model.train()
    count = adapters.reset(loaded.model)
    expected = len(TARGETS) * 2 * loaded.model.config.num_hidden_layers
    assert count == expected, f"{count} adapter matrices instead of {expected}"
    return loaded


def versions(engine: str, model: nn.Module) -> dict[str, str]:
    """Columns: what is installed and, for a peer, its version and the sign that it is at work."""
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes")
    found = {package: _version(package) for package in packages}
    peers = PEER_PACKAGES.get(engine.partition(":")[0], ())
    installed = [(package, _version(package)) for package in peers if not engine.endswith(CUDNN)]
    found["peer"] = ", ".join(f"{package} {version}" for package, version in installed if version)
    if engine == "unsloth":
        origins = {module.forward.__module__ for module in model.modules()}
        assert any("unsloth" in origin.lower() for origin in origins), f"Unsloth is not at work: {sorted(origins)}"
    elif "unsloth" in sys.modules:
        raise AssertionError(f"Unsloth is imported in the process of {engine}")
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _quantization(weights: str) -> Any:
    from transformers import BitsAndBytesConfig

    if not weights.startswith("nf4"):
        return None
    compute = torch.float32 if weights == "nf4-fp32" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _plain(path: Path, *, weights: str, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32 if weights.endswith("fp32") else torch.bfloat16,
        quantization_config=_quantization(weights),
        device_map={"": 0 if device == "cuda" else device},
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    return model


def _checkpointing(model: nn.Module, *, weights: str) -> nn.Module:
    """Gradient checkpointing, and PEFT's preparation of quantised models, as the documentation of both says."""
    from peft import prepare_model_for_kbit_training

    options = {"use_reentrant": False}
    if weights == "nf4":
        return prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=options
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    return model


def _with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=0.0, bias="none", target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _unsloth(path: Path, *, weights: str, longest: int) -> Loaded:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(path), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=weights == "nf4"
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth", random_state=3407,
    )  # fmt: skip
    return Loaded(model, "cuda")
