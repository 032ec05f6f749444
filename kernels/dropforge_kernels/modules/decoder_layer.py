"""One pre-norm decoder layer with LoRA adapters as a single autograd function whose backward is written by hand.

What the backward needs is kept, or computed again, as ``Keep`` says; norms and activations are always computed again,
because that costs a pass over memory that the products around them hide.

Legend: as in ``layer``; d... is the gradient of the loss with respect to ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from dropforge_kernels.modules import projection
from dropforge_kernels.modules.activation import gated, gated_backward
from dropforge_kernels.modules.joint_attention import Attended, attend, attend_again, attend_backward
from dropforge_kernels.modules.layer import Frame, Layer, Weights
from dropforge_kernels.modules.norm import Norm
from dropforge_kernels.modules.policy import Keep
from dropforge_kernels.modules.projection import Gradients, Group

if TYPE_CHECKING:
    from dropforge_kernels.modules.offload import HostStore


@dataclass
class AttentionState:
    """What the attention half leaves for its backward."""

    attended: Attended | None
    """None once the backward has used it up."""
    low_qkv: torch.Tensor | None
    low_o: torch.Tensor | None
    branch: torch.Tensor | None
    """o's output, where a norm follows it."""
    y: torch.Tensor | None
    """x + branch; None once the backward is past the MLP."""


@dataclass
class MlpState:
    """What the MLP half leaves for its backward; None: to be computed again."""

    gate_up: torch.Tensor | None = None
    low_gate_up: torch.Tensor | None = None
    low_down: torch.Tensor | None = None
    branch: torch.Tensor | None = None


@dataclass(frozen=True)
class KeptOutput:
    """All that ``Keep.OUTPUT`` keeps of the attention half."""

    out: torch.Tensor
    lse: torch.Tensor


def attention_half(
    layer: Layer, x: torch.Tensor, weights: Weights, frame: Frame, kept: KeptOutput | None = None
) -> AttentionState:
    """x (T, H) -> y and what the backward needs. kept: from an earlier run, so that attention does not run again."""
    normed, _ = layer.input_norm.forward(x)
    qkv, low_qkv = projection.forward(layer.qkv, normed, weights.qkv)
    del normed
    if kept is None:
        attended = attend(layer.attention, qkv, frame)
    else:
        attended = attend_again(layer.attention, qkv, frame, kept.out, kept.lse)
    y, low_o, branch = _branch(layer, layer.o, layer.attention_end, attended.out, weights.o, x)
    return AttentionState(attended, low_qkv, low_o, branch, y)


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
    layer: Layer,
    dy: torch.Tensor,
    x: torch.Tensor,
    state: AttentionState,
    weights: Weights,
    frame: Frame,
    *,
    wants_dx: bool,
) -> tuple[torch.Tensor | None, Gradients, Gradients]:
    """(dx or None, gradients of qkv's adapters, of o's). Takes state.attended away."""
    attended, state.attended = state.attended, None
    assert attended is not None
    dbranch = _branch_gradient(layer, layer.attention_end, dy, state.branch)
    dout, dlow = projection.backward_inputs(layer.o, dbranch, weights.o)
    assert dout is not None
    o = projection.backward_adapters(layer.o, dbranch, dlow, attended.out, state.low_o)
    del dbranch
    dqkv = attend_backward(layer.attention, dout, attended, frame)
    del dout, attended
    dnormed, dlow = projection.backward_inputs(layer.qkv, dqkv, weights.qkv, wants_dx=wants_dx)
    normed, rstd = layer.input_norm.forward(x)
    qkv = projection.backward_adapters(layer.qkv, dqkv, dlow, normed, state.low_qkv)
    del dqkv, normed
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
        assert attention.y is not None
        out, mlp = mlp_half(layer, attention.y, weights, None if keep is Keep.ALL else frame.mlp_tile)
        ctx.layer, ctx.frame = layer, frame
        ctx.attention = attention if keep in (Keep.ALL, Keep.ATTENTION) else None
        ctx.mlp = mlp if keep is Keep.ALL else MlpState()
        ctx.kept = _keep_rest(ctx, x, attention, keep, store if keep.on_host else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, frame = ctx.layer, ctx.frame
        with torch.autocast(dout.device.type, enabled=False):
            dout = dout.contiguous()
            x, kept = ctx.kept(ctx.saved_tensors)
            weights = layer.weights()
            attention = ctx.attention or attention_half(layer, x, weights, frame, kept)
            mlp, ctx.attention, ctx.mlp, ctx.kept = ctx.mlp, None, MlpState(), None
            y, attention.y = attention.y, None
            assert y is not None
            dy, gate_up, down = mlp_backward(layer, dout, y, mlp, weights, frame.mlp_tile)
            del dout, mlp, y, kept
            dx, qkv, o = attention_backward(layer, dy, x, attention, weights, frame, wants_dx=ctx.needs_input_grad[0])
        groups = ((layer.qkv, qkv), (layer.o, o), (layer.gate_up, gate_up), (layer.down, down))
        gradients = [gradient for group, made in groups for gradient in made.per_parameter(group)]
        return (dx, None, None, None, None, *gradients)


Kept = tuple[torch.Tensor, KeptOutput | None]


def _keep_rest(
    ctx: Any, x: torch.Tensor, attention: AttentionState, keep: Keep, store: HostStore | None
) -> Callable[[tuple[torch.Tensor, ...]], Kept]:
    """Puts x, and the attention's output where only that is kept, away. Returns what brings them back, once, from the
    context's saved tensors (which it does not hold itself: that would be a cycle).
    """
    assert attention.attended is not None
    out, lse = attention.attended.out, attention.attended.lse
    if keep not in (Keep.OUTPUT, Keep.OFFLOAD_OUTPUT) or lse is None:
        # Where attention keeps autograd's graph there is no output to go on from: it runs again.
        lse = None
    if store is None:
        ctx.save_for_backward(x, *(() if lse is None else (out, lse)))
        return lambda saved: (saved[0], None if len(saved) == 1 else KeptOutput(saved[1], saved[2]))
    x_ticket = store.put(x)
    if lse is None:
        return lambda saved: (store.get(x_ticket), None)
    out_ticket = store.put(out)
    ctx.save_for_backward(lse)

    def bring(saved: tuple[torch.Tensor, ...]) -> Kept:
        back = store.get(out_ticket)
        return store.get(x_ticket), KeptOutput(back, saved[0])

    return bring


def decoder_layer(
    x: torch.Tensor, layer: Layer, frame: Frame, *, keep: Keep = Keep.ALL, store: HostStore | None = None
) -> torch.Tensor:
    """x (T, H) in the compute dtype -> the layer's output, differentiable in x and the layer's adapters.

    keep: what the backward finds and what it computes again; the OFFLOAD ones need ``store``. The backward runs once.
    """
    if keep.on_host and store is None:
        raise ValueError(f"decoder_layer: keep=Keep.{keep.name} needs a store; received None")
    out: torch.Tensor = _DecoderLayer.apply(x, layer, frame, keep, store, *layer.parameters)
    return out
