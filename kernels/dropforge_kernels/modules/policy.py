"""What a decoder layer keeps for its backward pass."""

from __future__ import annotations

from enum import StrEnum


class Keep(StrEnum):
    """From most memory and least work to the opposite. Norms and activations are recomputed under every policy."""

    ALL = "keep"
    """All matrix products: q, k, v, the attention's output and log-sum-exp, the residual, gate and up."""
    ATTENTION = "keep_attention"
    """The same without gate and up, which the backward multiplies out again."""
    OUTPUT = "keep_output"
    """Only the attention's output and log-sum-exp, so that attention runs once; everything else is computed again."""
    NONE = "recompute"
    """Only the layer's input; the backward runs the whole layer again."""
    OFFLOAD = "offload"
    """Only the layer's input, and that in pinned host memory."""
    OFFLOAD_OUTPUT = "offload_output"
    """As ``OUTPUT``, with the layer's input and the attention's output in pinned host memory."""

    @property
    def on_host(self) -> bool:
        """Whether something goes to the host."""
        return self in (Keep.OFFLOAD, Keep.OFFLOAD_OUTPUT)
