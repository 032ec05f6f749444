"""Autograd and custom ops of the gated activations, for separate gate and up tensors and for one packed tensor."""

from __future__ import annotations

import torch

from dropforge_kernels import checks
from dropforge_kernels.ops._common import register
from dropforge_kernels.ops._glu import launch_backward, launch_forward


def check_pair(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Raises unless gate and up have one float dtype and one shape with at least one dimension."""
    checks.check_dtype(op, "gate", gate)
    checks.check_same_dtype(op, "up", up, "gate", gate)
    checks.check_same_shape(op, "up", up, "gate", gate)
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise ValueError(f"{op}: gate must have a last dimension of at least 1; received {tuple(gate.shape)}")


def check_packed(op: str, gate_up: torch.Tensor) -> None:
    """Raises unless the last dimension holds gate and up."""
    checks.check_dtype(op, "gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"{op}: gate_up must have an even last dimension (gate and up); received {tuple(gate_up.shape)}"
        )


def _writable(x: torch.Tensor) -> bool:
    """Whether a kernel can write into x's own memory: rows walked by one stride, no element shared."""
    if x.is_contiguous():
        return True
    outer = x.dim() - 2
    regular = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(outer))
    return x.stride(-1) == 1 and regular and (outer < 0 or x.stride(outer) >= x.shape[-1])


def _take(ctx: torch.autograd.function.FunctionCtx, *tensors: torch.Tensor) -> bool:
    """Whether backward may overwrite the saved tensors. Their version goes up when it does, so that a second
    backward, or another operation that saved them, raises instead of using gradients as values.
    """
    if not ctx.inplace:
        return False
    if not all(_writable(t) for t in tensors):
        return False
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)
    return True


class GatedPair(torch.autograd.Function):
    """Eager form for separate tensors: saves gate and up."""

    @staticmethod
    def forward(ctx, gate, up, activation, alpha, limit, inplace) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.scalars = activation, {"alpha": alpha, "limit": limit}
        ctx.inplace = inplace
        return launch_forward(gate, up, activation, alpha=alpha, limit=limit)

    @staticmethod
    def backward(ctx, dh) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if _take(ctx, gate, up):
            dgate, dup = gate, up
        else:
            dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        launch_backward(dh, gate, up, dgate, dup, ctx.activation, **ctx.scalars)
        return dgate, dup, None, None, None, None


class GatedPacked(torch.autograd.Function):
    """Eager form for one tensor that holds both, as halves or interleaved: saves it."""

    @staticmethod
    def forward(ctx, gate_up, activation, alpha, limit, interleaved, inplace) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.scalars = activation, {"alpha": alpha, "limit": limit, "interleaved": interleaved}
        ctx.inplace = inplace
        return packed_forward(gate_up, activation, alpha, limit, interleaved)

    @staticmethod
    def backward(ctx, dh) -> tuple[torch.Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        inplace = _take(ctx, gate_up)
        return packed_backward(dh, gate_up, ctx.activation, inplace=inplace, **ctx.scalars), *(None,) * 5


def _parts(gate_up: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (gate_up, gate_up) if interleaved else gate_up.detach().chunk(2, -1)


def packed_forward(
    gate_up: torch.Tensor, activation: int, alpha: float, limit: float, interleaved: bool
) -> torch.Tensor:
    """The launch alone: h (..., I) of gate_up (..., 2 I)."""
    gate, up = _parts(gate_up, interleaved)
    return launch_forward(gate, up, activation, alpha=alpha, limit=limit, interleaved=interleaved)


def packed_backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    activation: int,
    *,
    alpha: float,
    limit: float,
    interleaved: bool,
    inplace: bool,
) -> torch.Tensor:
    """The launch alone: the gradient of gate_up, in its own memory when ``inplace``."""
    target = gate_up if inplace else torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    launch_backward(
        dh,
        *_parts(gate_up, interleaved),
        *_parts(target, interleaved),
        activation,
        alpha=alpha,
        limit=limit,
        interleaved=interleaved,
    )
    return target


def _pair_backward_op(dh, gate, up, activation, alpha, limit):
    dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    launch_backward(dh, gate, up, dgate, dup, activation, alpha=alpha, limit=limit)
    return dgate, dup


def _pair_forward_op(gate, up, activation, alpha, limit):
    return launch_forward(gate, up, activation, alpha=alpha, limit=limit)


def _packed_backward_op(dh, gate_up, activation, alpha, limit, interleaved):
    return packed_backward(dh, gate_up, activation, alpha=alpha, limit=limit, interleaved=interleaved, inplace=False)


PAIR = register(
    "gated_pair",
    "(Tensor gate, Tensor up, int activation, float alpha, float limit) -> Tensor",
    _pair_forward_op,
    lambda gate, up, activation, alpha, limit: gate.new_empty(gate.shape),
)
_PAIR_BACKWARD = register(
    "gated_pair_backward",
    "(Tensor dh, Tensor gate, Tensor up, int activation, float alpha, float limit) -> (Tensor, Tensor)",
    _pair_backward_op,
    lambda dh, gate, up, activation, alpha, limit: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
PACKED = register(
    "gated_packed",
    "(Tensor gate_up, int activation, float alpha, float limit, bool interleaved) -> Tensor",
    packed_forward,
    lambda gate_up, *_: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
_PACKED_BACKWARD = register(
    "gated_packed_backward",
    "(Tensor dh, Tensor gate_up, int activation, float alpha, float limit, bool interleaved) -> Tensor",
    _packed_backward_op,
    lambda dh, gate_up, *_: gate_up.new_empty(gate_up.shape),
)


def _pair_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _packed_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


PAIR.register_autograd(
    lambda ctx, dh: (*_PAIR_BACKWARD(dh, *ctx.saved_tensors, *ctx.options), None, None, None),
    setup_context=_pair_setup,
)
PACKED.register_autograd(
    lambda ctx, dh: (_PACKED_BACKWARD(dh, *ctx.saved_tensors, *ctx.options), None, None, None, None),
    setup_context=_packed_setup,
)
