"""The peak of a training step, followed through forward, loss and backward layer by layer. No torch.

All layers are alike, so a plan is how many layers, from the first on, follow each policy, those that keep least first.
In this order memory falls fastest in the backward: what the last layers keep is free again when the layers that compute
everything anew need room. The formulas mirror ``decoder_layer``, ``joint_attention`` and ``causal_lm``; every term is
bytes per token of what is alive at that moment.

Legend: as in ``model_shape``; B = bytes of a value of the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from dropforge_kernels.modules.head_pieces import head_pieces
from dropforge_kernels.modules.model_shape import ModelShape, Training

B = 2
ADAPTER_BYTES = 4 + B
"""Of an adapter's value: the fp32 master and the engine's copy."""
LOSS_BUDGET = 400 << 20
"""The fused loss's logits (ops/_head_chunks.py, frozen head)."""
WORKSPACE = 96 << 20
"""cuBLAS's and attention's workspaces, the batch and other small buffers."""


@dataclass(frozen=True)
class Counts:
    """Layers by policy (``policy.Keep``), in the order of the layers."""

    offload: int = 0
    offload_output: int = 0
    recompute: int = 0
    output: int = 0
    attention: int = 0
    keep: int = 0

    @property
    def layers(self) -> int:
        return self.offload + self.offload_output + self.recompute + self.output + self.attention + self.keep

    @property
    def host_tensors(self) -> int:
        """Tensors as large as a layer's input that go to the host, the attention's output taken for one."""
        return self.offload + 2 * self.offload_output


@dataclass(frozen=True)
class LayerBytes:
    """Per token."""

    x: int
    output: int
    """The attention's output."""
    lse: int
    """Log-sum-exp."""
    attention: int
    """What attention's half leaves: q k v, output, log-sum-exp, y, low-rank products, branch."""
    mlp: int
    """gate and up, low-rank products, branch."""
    gated: int
    attention_backward: int
    """Beyond attention's half: gradients of the output and of the joined q k v, and what cuDNN needs beside those."""

    @classmethod
    def of(cls, shape: ModelShape, training: Training, *, row: int) -> LayerBytes:
        """row: as in ``peak``."""
        q, k, h = shape.queries * B, shape.keys * B, shape.hidden * B
        joined, lse, branch = q + 2 * k, 4 * shape.heads, h if shape.end_norms else 0
        low = B * training.rank("q_proj", "k_proj", "v_proj", "o_proj")
        low_mlp = B * training.rank("gate_proj", "up_proj", "down_proj")
        normed_heads = 2 * (q + k) if shape.head_norms else 0
        # cuDNN's: the gradients once more, dq in fp32, and for grouped heads dk and dv of every query head
        scratch = joined + 2 * q + (2 * q if k < q else 0)
        groups = shape.heads * shape.keys // shape.queries
        pieces = head_pieces(shape.heads, groups, row) if shape.splits_heads else 1
        return cls(
            x=h,
            output=q,
            lse=lse,
            attention=joined + q + lse + h + low + branch,
            mlp=2 * shape.intermediate * B + low_mlp + branch,
            gated=shape.intermediate * B,
            attention_backward=q + joined + scratch // pieces + normed_heads,
        )


@dataclass(frozen=True)
class Peak:
    """Predicted bytes, the CUDA context left out."""

    weights: int
    adapters: int
    """Masters, copies in the compute dtype, gradients and optimizer states."""
    buffers: int
    """Dequantised layer, rotation tables, workspaces, the loss's logits."""
    activations: int
    """Kept and working tensors at the worst moment."""
    host: int
    """Pinned host memory."""

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.buffers + self.activations


def peak(
    shape: ModelShape, training: Training, counts: Counts, *, tokens: int, tile: int | None, row: int = 0
) -> Peak:  # fmt: skip
    """``tokens`` of one micro-batch; ``tile``: rows of the MLP at a time in layers that do not keep everything;
    ``row``: ``tokens`` where all of them are one document, else 0.
    """
    each = LayerBytes.of(shape, training, row=row)
    trained = training.trained_values(shape)
    gradients = 4 * trained if training.gradients_stay else 0
    scratch = B * shape.layer_values if training.weights == "nf4" else 0
    tables = tokens * shape.queries // shape.heads * 4
    rows = min(tokens, max(16, LOSS_BUDGET // (B * shape.vocabulary)))
    loss = rows * B * (shape.vocabulary + 2 * shape.hidden)
    walk = _Walk(each, tokens=tokens, tile=tile, layers=shape.layers, gradients=4 * trained - gradients)
    activations = walk.worst(counts, loss)
    return Peak(
        weights=training.weight_bytes(shape),
        adapters=ADAPTER_BYTES * trained + training.optimizer_bytes(shape) + gradients,
        buffers=scratch + tables + WORKSPACE,
        activations=activations,
        host=(counts.offload * each.x + counts.offload_output * (each.x + each.output)) * tokens,
    )


class _Walk:
    """Follows one step. Among layers of one policy the first or the last is the worst: only those are looked at."""

    def __init__(self, each: LayerBytes, *, tokens: int, tile: int | None, layers: int, gradients: int) -> None:
        self.each, self.tokens, self.layers, self.gradients = each, tokens, layers, gradients
        self.tiled = tile is not None and tile < tokens
        self.share = min(1.0, tile / tokens) if tile else 1.0

    def worst(self, counts: Counts, loss: int) -> int:
        each, x = self.each, self.each.x
        kept = {
            "offload": 0,
            "offload_output": each.lse,
            "recompute": x,
            "output": x + each.output + each.lse,
            "attention": x + each.attention,
            "keep": x + each.attention + each.mlp,
        }
        held, done, worst = 0.0, 0, float(self.gradients)
        groups = [(name, getattr(counts, name)) for name in kept if getattr(counts, name)]
        for name, count in groups:
            before, first = held + (count - 1) * kept[name], held + kept[name]
            worst = max(worst, self.tokens * (before + self._forward(name)))
            worst = max(worst, self.tokens * (first + self._backward(name)) + self._made(done + 1))
            done += count
            held += count * kept[name]
            worst = max(worst, self.tokens * (held + self._backward(name)) + self._made(done))
        last = x + (self._on_the_way(groups[-1][0]) if groups else 0)
        # the last layer's output, its norm, its gradient; then the gradient twice and the norm's own
        worst = max(worst, self.tokens * (held + last + 2 * x + 28) + loss, self.tokens * (held + last + 3 * x))
        return int(worst)

    def _made(self, layer: int) -> float:
        """Adapter gradients there are once the backward has come down to this layer, counted from 1."""
        return self.gradients * (self.layers - layer) / self.layers

    def _on_the_way(self, name: str) -> int:
        """Tensors of one layer that are being copied to or from the host."""
        each = self.each
        return {"offload": each.x, "offload_output": each.x + each.output}.get(name, 0)

    def _forward(self, name: str) -> float:
        """Beyond what earlier layers keep."""
        each = self.each
        share = 1.0 if name == "keep" else self.share
        mlp = share * (each.mlp + each.gated + each.x) + (each.x if self.tiled and name != "keep" else 0)
        embedded = each.x if name in ("offload", "offload_output") else 0  # the caller holds the first layer's input
        return each.x + embedded + self._on_the_way(name) + each.attention + mlp

    def _backward(self, name: str) -> float:
        """Beyond what this and earlier layers keep; the layer's own kept tensors are counted by the caller."""
        each = self.each
        fetched = each.x + self._on_the_way(name) if name in ("offload", "offload_output") else 0
        again = {
            "offload": each.attention,
            "offload_output": each.attention - each.lse,
            "recompute": each.attention,
            "output": each.attention - each.output - each.lse,
        }.get(name, 0)
        if name == "keep":
            mlp = each.x + max(each.gated, 2 * each.x)
            attention: float = each.attention_backward - each.mlp
        else:
            mlp = int(self.share * (each.x + each.mlp + max(each.gated, 2 * each.x))) + (each.x if self.tiled else 0)
            attention = each.attention_backward
        # the gradient that comes in, then as much for dy, which takes y's place
        return each.x + again + fetched + max(mlp, attention)
