"""One pre-norm decoder layer with LoRA adapters as a single autograd function whose backward is written by hand.

What the backward needs is kept, or computed again, as ``Keep`` says; norms and activations are always computed again,
because that costs a pass over memory that the products around them hide. Attention is the one piece left to autograd:
its output carries its own small graph (q, k, v, output, log-sum-exp), which is part of what a layer keeps.

Legend: as in ``layer``; d... is the gradient of the loss with respect to ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from dropforge_kernels.modules import projection
from dropforge_kernels.modules.activation import gated, gated_backward
from dropforge_kernels.modules.joint_attention import attend
from dropforge_kernels.modules.layer import Frame, Layer, Weights
from dropforge_kernels.modules.norm import Norm
from dropforge_kernels.modules.policy import Keep
from dropforge_kernels.modules.projection import Gradients, Group

if TYPE_CHECKING:
    from dropforge_kernels.modules.offload import HostStore


@dataclass
class AttentionState:
    """What the attention half leaves for its backward."""

    qkv: torch.Tensor
    """Leaf of attention's own graph."""
    out: torch.Tensor
    """(T, heads D), with that graph."""
    low_qkv: torch.Tensor | None
    low_o: torch.Tensor | None
    branch: torch.Tensor | None
    """o's output, where a norm follows it."""
    y: torch.Tensor
    """x + branch."""


@dataclass
class MlpState:
    """What the MLP half leaves for its backward; None: to be computed again."""

    gate_up: torch.Tensor | None = None
    low_gate_up: torch.Tensor | None = None
    low_down: torch.Tensor | None = None
    branch: torch.Tensor | None = None


def attention_half(layer: Layer, x: torch.Tensor, weights: Weights, frame: Frame) -> AttentionState:
    """x (T, H) -> y and what the backward needs."""
    normed, _ = layer.input_norm.forward(x)
    qkv, low_qkv = projection.forward(layer.qkv, normed, weights.qkv)
    del normed
    with torch.enable_grad():
        out = attend(layer.attention, qkv.requires_grad_(), frame)
    y, low_o, branch = _branch(layer, layer.o, layer.attention_end, out.detach(), weights.o, x)
    return AttentionState(qkv, out, low_qkv, low_o, branch, y)


def _branch(
    layer: Layer, group: Group, end: Norm | None, inputs: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(residual + the branch, low, the branch before its end norm or None)."""
    if end is None:
        total, low = projection.forward(group, inputs, weight, residual=residual, alpha=layer.multiplier)
        return total, low, None
    branch, low = projection.forward(group, inputs, weight)
    return residual + end.forward(branch)[0], low, branch


def mlp_half(layer: Layer, y: torch.Tensor, weights: Weights, tile: int | None) -> tuple[torch.Tensor, MlpState]:
    """y (T, H) -> (out, what the backward needs, empty when computed in tiles)."""
    if tile is not None and tile < y.shape[0]:
        out = torch.empty_like(y)
        for rows in _tiles(y.shape[0], tile):
            out[rows] = mlp_half(layer, y[rows], weights, None)[0]
        return out, MlpState()
    gate_up, low_gate_up = _gate_up(layer, y, weights)
    out, low_down, branch = _branch(layer, layer.down, layer.mlp_end, gated(gate_up, layer.activation), weights.down, y)
    return out, MlpState(gate_up, low_gate_up, low_down, branch)


def _gate_up(layer: Layer, y: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor | None]:
    return projection.forward(layer.gate_up, layer.mlp_norm.forward(y)[0], weights.gate_up)


def _tiles(rows: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]


def mlp_backward(
    layer: Layer, dout: torch.Tensor, y: torch.Tensor, state: MlpState, weights: Weights, tile: int | None
) -> tuple[torch.Tensor, Gradients, Gradients]:
    """(dy, gradients of gate_up's adapters, of down's). Overwrites state.gate_up."""
    if state.gate_up is None and tile is not None and tile < y.shape[0]:
        dy, gate_up, down = torch.empty_like(y), Gradients(), Gradients()
        for rows in _tiles(y.shape[0], tile):
            dy[rows], *gradients = mlp_backward(layer, dout[rows], y[rows], MlpState(), weights, None)
            gate_up.add(gradients[0])
            down.add(gradients[1])
        return dy, gate_up, down
    normed, rstd = layer.mlp_norm.forward(y)
    if state.gate_up is None:
        state.gate_up, state.low_gate_up = projection.forward(layer.gate_up, normed, weights.gate_up)
    if layer.mlp_end is not None and state.branch is None:
        state.branch, state.low_down = projection.forward(
            layer.down, gated(state.gate_up, layer.activation), weights.down
        )
    dbranch = _branch_gradient(layer, layer.mlp_end, dout, state.branch)
    dh, dlow = projection.backward_inputs(layer.down, dbranch, weights.down)
    assert dh is not None
    d_gate_up, h = gated_backward(dh, state.gate_up, layer.activation)
    down = projection.backward_adapters(layer.down, dbranch, dlow, h, state.low_down)
    del dh, h, dbranch
    dnormed, dlow = projection.backward_inputs(layer.gate_up, d_gate_up, weights.gate_up)
    assert dnormed is not None
    gate_up = projection.backward_adapters(layer.gate_up, d_gate_up, dlow, normed, state.low_gate_up)
    return layer.mlp_norm.backward(dnormed, y, rstd, onto=dout), gate_up, down


def _branch_gradient(layer: Layer, end: Norm | None, dtotal: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
    if end is not None:
        assert branch is not None
        return end.backward(dtotal, branch, end.forward(branch)[1])
    return dtotal if layer.multiplier == 1.0 else dtotal * layer.multiplier


def attention_backward(
    layer: Layer, dy: torch.Tensor, x: torch.Tensor, state: AttentionState, weights: Weights, *, wants_dx: bool
) -> tuple[torch.Tensor | None, Gradients, Gradients]:
    """(dx or None, gradients of qkv's adapters, of o's)."""
    dbranch = _branch_gradient(layer, layer.attention_end, dy, state.branch)
    dout, dlow = projection.backward_inputs(layer.o, dbranch, weights.o)
    o = projection.backward_adapters(layer.o, dbranch, dlow, state.out.detach(), state.low_o)
    del dbranch
    (dqkv,) = torch.autograd.grad(state.out, state.qkv, dout)
    del dout
    dnormed, dlow = projection.backward_inputs(layer.qkv, dqkv, weights.qkv, wants_dx=wants_dx)
    normed, rstd = layer.input_norm.forward(x)
    qkv = projection.backward_adapters(layer.qkv, dqkv, dlow, normed, state.low_qkv)
    if dnormed is None:
        return None, qkv, o
    return layer.input_norm.backward(dnormed, x, rstd, onto=dy), qkv, o


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, frame: Frame, keep: Keep, store: HostStore | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        weights = layer.weights()
        attention = attention_half(layer, x, weights, frame)
        out, mlp = mlp_half(layer, attention.y, weights, None if keep is Keep.ALL else frame.mlp_tile)
        ctx.layer, ctx.frame, ctx.keep, ctx.store = layer, frame, keep, store
        ctx.attention = attention if keep in (Keep.ALL, Keep.ATTENTION) else None
        ctx.mlp = mlp if keep is Keep.ALL else MlpState()
        ctx.ticket = store.put(x) if keep is Keep.OFFLOAD and store is not None else None
        ctx.save_for_backward(*(() if ctx.ticket is not None else (x,)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, frame = ctx.layer, ctx.frame
        x = ctx.store.get(ctx.ticket) if ctx.ticket is not None else ctx.saved_tensors[0]
        weights = layer.weights()
        attention = ctx.attention or attention_half(layer, x, weights, frame)
        mlp, ctx.attention, ctx.mlp = ctx.mlp, None, MlpState()
        with torch.autocast(dout.device.type, enabled=False):
            dout = dout.contiguous()
            dy, gate_up, down = mlp_backward(layer, dout, attention.y, mlp, weights, frame.mlp_tile)
            del dout, mlp
            dx, qkv, o = attention_backward(layer, dy, x, attention, weights, wants_dx=ctx.needs_input_grad[0])
        groups = ((layer.qkv, qkv), (layer.o, o), (layer.gate_up, gate_up), (layer.down, down))
        gradients = [gradient for group, made in groups for gradient in made.per_parameter(group)]
        return (dx, None, None, None, None, *gradients)


def decoder_layer(
    x: torch.Tensor, layer: Layer, frame: Frame, *, keep: Keep = Keep.ALL, store: HostStore | None = None
) -> torch.Tensor:
    """x (T, H) in the compute dtype -> the layer's output, differentiable in x and the layer's adapters.

    keep: what the backward finds and what it computes again; OFFLOAD needs ``store``. The backward runs once.
    """
    if keep is Keep.OFFLOAD and store is None:
        raise ValueError("decoder_layer: keep=Keep.OFFLOAD needs a store; received None")
    out: torch.Tensor = _DecoderLayer.apply(x, layer, frame, keep, store, *layer.parameters)
    return out
