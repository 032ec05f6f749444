"""Tiny random models of every family, and how two models are compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # As in tests/kernels/conftest.py: must be set before the first import of dropforge_kernels.ops in this process.
    os.environ["TRITON_INTERPRET"] = "1"

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OWN = {
    "mistral": {"sliding_window": 5},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 5},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def loops_in_the_interpreter() -> Iterator[None]:
    """Kernels may loop over a run-time count."""
    from dropforge_kernels.testing import interpreted_loops

    with interpreted_loops():
        yield


@pytest.fixture
def tiny() -> Callable[..., torch.nn.Module]:
    """tiny(family, **config): a model in training mode, the same weights at every call."""

    def make(family: str, **config) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {**SMALL, **OWN.get(family, {}), **config}
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # norms and biases are constants at birth; a constant hides mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                else:  # weights at birth are so small that a layer changes nothing
                    parameter.mul_(20 if "embed" in name or "lm_head" in name else 8)
        return model.train()

    return make


@pytest.fixture
def adapted() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """adapted(model): with LoRA on every linear layer, which changes what the model computes."""

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return wrapped

    return wrap


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows, the second padded on the right; some labels ignored."""
    torch.manual_seed(5)
    input_ids = torch.randint(3, 97, (2, 13))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    labels = input_ids.clone()
    labels[:, :3] = -100
    labels[1, 9:] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
