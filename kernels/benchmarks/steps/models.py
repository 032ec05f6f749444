"""What is measured: model shapes, batch shapes, engines with their settings. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_parameters": LLAMA_ROPE, "bos_token_id": 128000, "eos_token_id": 128001,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""LlamaConfig fields."""

PARITY_LAYERS = 2
"""Of the slice whose gradients are compared."""
PARITY_SHAPE = "2x2304"
"""Long enough that FlashAttention 4 takes part where it is installed."""
RANK = 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = "2x2048,8x2048,1x8192,1x32768,1x131072"
TINY_SHAPES = "2x32,1x64"

ENGINES = {
    "hf": "transformers + PEFT + SDPA, gradient checkpointing",
    "liger": "the same + Liger",
    "unsloth": 'Unsloth, use_gradient_checkpointing="unsloth"',
    "ours:planner": "Dropforge, the memory planner chooses",
    "ours:equal": "Dropforge, every layer recomputed, its input in host memory (Unsloth's policy)",
    "ours:recompute": "Dropforge, every layer recomputed, its input on the GPU",
    "ours:lean": "Dropforge, layer inputs and attention outputs in host memory, attention run once",
    "ours:output": "Dropforge, layer inputs and attention outputs on the GPU, attention run once",
    "ours:attention": "Dropforge, attention kept, MLP recomputed",
    "ours:keep": "Dropforge, everything kept",
    "ours:planner-cudnn": "as ours:planner, attention by cuDNN where FlashAttention 4 would do it",
    "ours:lean-cudnn": "as ours:lean, attention by cuDNN where FlashAttention 4 would do it",
    "ours:equal-cudnn": "as ours:equal, attention by cuDNN where FlashAttention 4 would do it",
    "ours:ops": "Dropforge, single operations swapped, the layers' own backward, gradient checkpointing",
}
CUDNN = "-cudnn"
"""Suffix of a setting."""
PEER_PACKAGES = {"ours": ("flash-attn-4",), "liger": ("liger-kernel",), "unsloth": ("unsloth", "unsloth_zoo")}


@dataclass(frozen=True)
class BatchShape:
    """``batch`` sequences of ``length`` tokens."""

    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


def parse_shapes(text: str) -> list[BatchShape]:
    """``2x2048,1x8192`` -> shapes."""
    return [BatchShape(*(int(number) for number in part.split("x"))) for part in text.split(",")]


def truth_name(weights: str) -> str:
    """File of the parity check's reference."""
    return f"truth-{weights}-{PARITY_SHAPE}.pt"


def same_process(engines: list[str]) -> list[list[str]]:
    """Neighbours that may share a process and a loaded model: settings of ours that differ in the policy alone."""
    groups: list[list[str]] = []
    for engine in engines:
        shares = engine.startswith("ours:") and engine != "ours:ops"
        if groups and shares and groups[-1][0].startswith("ours:") and groups[-1][0] != "ours:ops":
            groups[-1].append(engine)
        else:
            groups.append([engine])
    return groups


def parse_engines(text: str) -> list[str]:
    """``ours:planner,unsloth``; ``ours`` alone means the planner. Raises SystemExit for an unknown one."""
    names = ["ours:planner" if name == "ours" else name for name in text.split(",")]
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise SystemExit(f"unknown engine {unknown[0]!r}; known: {', '.join(ENGINES)}")
    return names
