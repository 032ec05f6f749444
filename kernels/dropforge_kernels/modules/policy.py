"""What a decoder layer keeps for its backward pass."""

from __future__ import annotations

from enum import StrEnum


class Keep(StrEnum):
    """From most memory and least work to the opposite. Norms and activations are recomputed under every policy."""

    ALL = "keep"
    """All matrix products: q, k, v, the attention's output and log-sum-exp, the residual, gate and up."""
    ATTENTION = "keep_attention"
    """The same without gate and up, which the backward multiplies out again."""
    NONE = "recompute"
    """Only the layer's input; the backward runs the whole layer again."""
    OFFLOAD = "offload"
    """Only the layer's input, and that in pinned host memory."""
