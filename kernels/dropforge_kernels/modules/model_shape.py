"""A decoder's sizes as its configuration gives them, and what training it means in bytes and operations. No torch.

Legend: H hidden width, I width of the MLP, Q heads x head width, K groups x head width, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 4.127 / 8}
"""Bytes of a frozen value in a decoder layer; nf4: 4 bits, one 8-bit scale per 64 values, one fp32 per 256 scales."""
OPTIMIZER_BYTES = {"adamw_8bit": 2.04, "lion_8bit": 1.02, "sgd": 0.0, "adafactor": 0.1}
"""State of a trained value: 8-bit states with one fp32 scale per 256; AdamW in 32 bits (8 bytes) when not listed."""
OFFLOADED_STATES = ("paged_adamw_8bit", "paged_adamw_32bit")
WIDEST_SPLIT = 128
"""As ``joint_attention.CUDNN_WIDTH``."""
_HEAD_NORMS = frozenset({"qwen3", "gemma3", "gemma3_text"})
_END_NORMS = frozenset({"gemma2", "gemma3", "gemma3_text"})


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder whose layers are all alike."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    """Q."""
    keys: int
    """K."""
    heads: int
    vocabulary: int
    tied: bool = False
    """The head is the embedding's matrix."""
    head_norms: bool = False
    """q and k are normed head by head, which keeps both before and after."""
    end_norms: bool = False
    """A norm follows attention and MLP, which keeps both branches."""
    splits_heads: bool = True
    """Attention of one long row may run on some heads at a time (``head_pieces``): no window, no cap, heads as wide as
    cuDNN takes them."""

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Projection -> (outputs, inputs)."""
        wide, gated = (self.queries, self.keys), self.intermediate
        return {
            "q_proj": (wide[0], self.hidden), "k_proj": (wide[1], self.hidden), "v_proj": (wide[1], self.hidden),
            "o_proj": (self.hidden, wide[0]), "gate_proj": (gated, self.hidden), "up_proj": (gated, self.hidden),
            "down_proj": (self.hidden, gated),
        }  # fmt: skip

    @property
    def layer_values(self) -> int:
        """Values of one layer's matrices."""
        return sum(outputs * inputs for outputs, inputs in self.matrices.values())

    @property
    def embedding_values(self) -> int:
        """Values of the embedding and the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """From config.json's fields (of the text part, where there are several).

    Raises ValueError for a configuration without the sizes of a decoder with a gated MLP.
    """
    config = config.get("text_config") or config
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(f"model_shape: the configuration has no {', '.join(missing)}; only decoders can be planned")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    kind = str(config.get("model_type"))
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        queries=heads * width,
        keys=(config.get("num_key_value_heads") or heads) * width,
        heads=heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        head_norms=kind in _HEAD_NORMS,
        end_norms=kind in _END_NORMS,
        splits_heads=width <= WIDEST_SPLIT and not _windowed(config),
    )


def _windowed(config: Mapping[str, Any]) -> bool:
    window = config.get("sliding_window") and config.get("use_sliding_window", True)
    return bool(window or config.get("attn_logit_softcapping"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model is trained: frozen weights with LoRA."""

    weights: str = "bf16"
    """A key of WEIGHT_BYTES; embedding and head are held in 16 bits with every quantised kind."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank per projection, 0 or missing: no adapter."""
    optimizer: str = "adamw_8bit"
    embedding_on_host: bool = False
    """The input embedding lies in host memory (``patch.host_embedding``); a tied one never does."""
    gradients_stay: bool = False
    """Gradients live in buffers of their own that are not given back between steps."""

    @classmethod
    def of_rank(cls, rank: int, **fields: Any) -> Training:
        """The same rank on every projection."""
        return cls(ranks=dict.fromkeys(PROJECTIONS, rank), **fields)

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_BYTES:
            raise ValueError(f"Training: weights must be one of {', '.join(WEIGHT_BYTES)}; received {self.weights!r}")
        unknown = [name for name in self.ranks if name not in PROJECTIONS]
        if unknown:
            raise ValueError(f"Training: ranks must name {', '.join(PROJECTIONS)}; received {unknown[0]!r}")

    def rank(self, *projections: str) -> int:
        """Sum of the ranks of these projections."""
        return sum(self.ranks.get(name, 0) for name in projections)

    def trained_values(self, shape: ModelShape) -> int:
        """Values of all adapters: r (inputs + outputs) each."""
        layer = sum(self.rank(name) * sum(sizes) for name, sizes in shape.matrices.items())
        return layer * shape.layers

    def weight_bytes(self, shape: ModelShape) -> int:
        """The frozen weights on the device."""
        value = WEIGHT_BYTES[self.weights]
        tables = shape.embedding_values
        if self.embedding_on_host and not shape.tied:
            tables -= shape.vocabulary * shape.hidden
        return int(shape.layers * shape.layer_values * value + tables * max(2.0, value))

    def optimizer_bytes(self, shape: ModelShape) -> int:
        """Optimizer states on the device; paged ones are not counted."""
        value = 0.0 if self.optimizer in OFFLOADED_STATES else OPTIMIZER_BYTES.get(self.optimizer, 8.0)
        return int(self.trained_values(shape) * value)


@dataclass(frozen=True)
class Work:
    """Operations of one layer per token: 2 per multiply-add, adapters left out."""

    gate_up: float
    """The forward of gate and up."""
    projections: float
    """The forward of q, k, v and o."""
    scores: float
    """The forward of attention itself."""
    whole: float
    """Forward and backward with frozen weights, nothing computed twice."""

    @classmethod
    def of(cls, shape: ModelShape, *, document: int) -> Work:
        """``document``: mean length of what attends to itself, causal."""
        gate_up = 4.0 * shape.hidden * shape.intermediate
        projections = 2.0 * shape.hidden * (2 * shape.queries + 2 * shape.keys)
        scores = 2.0 * document * shape.queries
        down = 2.0 * shape.hidden * shape.intermediate
        return cls(gate_up, projections, scores, 2 * (gate_up + projections + down) + 3.5 * scores)
