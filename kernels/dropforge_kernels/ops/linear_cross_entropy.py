"""Cross-entropy of hidden states through a head, without ever forming the full logits.

    loss = cross_entropy(hidden @ weight.T, target, ...)         (formula: ops/cross_entropy.py)

Rows are taken a chunk at a time (ops/_head_chunks.py): logits of the chunk by the vendor GEMM in the hidden states'
dtype, losses (fp32 statistics) and d nll / d logits in place in one launch, then d hidden = d logits W. So the
forward already holds the gradient, and the backward multiplies it by upstream / divisor: 4 N H V FLOP in all with a
frozen head, 6 N H V with a trained one, and no logits are computed twice. Gradients are kept undivided until the
backward, so fp16 loses nothing that a loss scale would have kept. Method: gradient in the forward as in Hsu et al.
2024 (Liger, arXiv:2410.10989); without its host-side logits copies; compaction of ignored rows is ours."""

from __future__ import annotations

import torch

from dropforge_kernels import reference
from dropforge_kernels.checks import (
    check_choice,
    check_dtype,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._head_chunks import FROZEN_BUDGET, TRAINED_BUDGET, Head, chunk_rows, row_chunks, scale_rows
from dropforge_kernels.ops._row_losses import RowLoss, reduce_loss, row_loss
from dropforge_kernels.ops.cross_entropy import TARGETS, check_loss_options, items_tensor

OP = "linear_cross_entropy"


@torch.library.custom_op("dropforge::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    reduction: str,
    max_valid: int | None,
    skip_ignored: bool,
    rows_per_chunk: int,
    need_hidden: bool,
    need_weight: bool,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    label_smoothing: float,
    z_loss_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, 1 / divisor, sum of nll's gradient to hidden (N, H) or empty, to weight (V, H) fp32 or empty)."""
    rule = RowLoss(ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight)
    head = Head(hidden, weight, rows_per_chunk, need_hidden=need_hidden, need_weight=need_weight)
    nll = torch.zeros(target.numel(), dtype=torch.float32, device=hidden.device)
    lse = torch.empty(rows_per_chunk, dtype=torch.float32, device=hidden.device)
    backward = need_hidden or need_weight
    for chunk in row_chunks(
        target, rows_per_chunk, ignore_index=ignore_index, max_valid=max_valid, skip_ignored=skip_ignored
    ):
        part, logits = head.logits_of(chunk)
        rows = chunk.stop - chunk.start
        # compacted rows leave nll's tail at zero: only the sum is used
        row_loss(logits, chunk.target, rule, nll=nll[chunk.start : chunk.stop], lse=lse[:rows], gradient=backward)
        if backward:
            head.take_gradient(chunk, part, logits)
    loss, scale = reduce_loss(
        nll, target, ignore_index=ignore_index, reduction=reduction, num_items=num_items, limit=max_valid
    )
    d_hidden = head.d_hidden if head.d_hidden is not None else hidden.new_empty(0)
    d_weight = head.d_weight if head.d_weight is not None else nll.new_empty(0)
    return loss, scale, d_hidden, d_weight


@_forward.register_fake
def _(
    hidden, weight, target, num_items, reduction, max_valid, skip_ignored, rows, need_hidden, need_weight, *_: object
):
    scalar = hidden.new_empty((), dtype=torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    d_weight = hidden.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), d_hidden, d_weight


@torch.library.custom_op("dropforge::scale_gradient", mutates_args=())
def scale_gradient(
    x: torch.Tensor, scale: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype, sign: int
) -> torch.Tensor:
    """x (N, W) * scale * upstream * sign in a new tensor; upstream: one value, or one per row of x."""
    return scale_rows(x, scale, upstream, dtype, sign=sign)


@scale_gradient.register_fake
def _(x, scale, upstream, dtype, sign):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _save(ctx, inputs, output) -> None:
    hidden, weight = inputs[0], inputs[1]
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.needs = inputs[8], inputs[9]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx, d_loss, *_: object):
    if d_loss is None:
        return (None,) * 15
    scale, d_hidden, d_weight = ctx.saved_tensors
    to_hidden = scale_gradient(d_hidden, scale, d_loss, ctx.dtypes[0], 1) if ctx.needs[0] else None
    to_weight = scale_gradient(d_weight, scale, d_loss, ctx.dtypes[1], 1) if ctx.needs[1] else None
    return (to_hidden, to_weight, *(None,) * 13)


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    max_valid: int | None = None,
    skip_ignored: bool = True,
    memory_budget: int | None = None,
) -> torch.Tensor:
    """``cross_entropy(hidden @ weight.T, target)`` in chunks of rows; formula and method at the top of this file.

    hidden: (..., H), weight: (V, H), both bf16, fp16 or fp32 (one dtype; under autocast both are cast to its dtype).
    target: (...) int64 or int32, already shifted. reduction "mean" or "sum"; num_items_in_batch replaces the divisor.
    Result: fp32 scalar. Gradients reach hidden, and weight where it requires them (summed in fp32 over chunks). Saved
    for backward: the gradients. max_valid: an upper bound on the targets that count, known on the host; rows beyond
    it are never computed, nothing waits for the GPU and the call can be captured. A bound that is too low makes the
    loss NaN. Without it the ignored rows are found on the device and their number is read on the host while the first
    chunk runs (not during capture: then all rows are computed); skip_ignored=False computes all rows without waiting.
    memory_budget: bytes of the logits buffer (default 400 MiB, 1 GiB with a trained head; ``budget_from_free_memory``
    proposes one); at least 16 rows are computed at a time. A target outside [0, V) makes the loss NaN. Raises
    TypeError and ValueError for wrong dtypes, shapes, devices and options."""
    hidden, weight = autocast_pair(hidden, weight)
    check_head(OP, hidden, weight, target, max_valid=max_valid, memory_budget=memory_budget)
    check_choice(OP, "reduction", reduction, ("mean", "sum"))
    check_loss_options(
        OP,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
    )
    options = (ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight)
    if choose(OP, hidden, weight, target).backend is Backend.REFERENCE:
        return reference.linear_cross_entropy(
            hidden,
            weight,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            label_smoothing=label_smoothing,
            z_loss_weight=z_loss_weight,
        )
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    flat = target.reshape(-1).contiguous()
    budget = memory_budget or (TRAINED_BUDGET if need_weight else FROZEN_BUDGET)
    bound = flat.numel() if max_valid is None else min(max_valid, flat.numel())
    rows = chunk_rows(bound, weight.shape[0], hidden.element_size(), budget)
    items = items_tensor(OP, num_items_in_batch, hidden.device)
    states = hidden.reshape(-1, hidden.shape[-1])
    loss, *_ = _forward(
        states, weight, flat, items, reduction, max_valid, skip_ignored, rows, need_hidden, need_weight, *options
    )
    return loss


def autocast_pair(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in autocast's dtype where autocast is on (differentiable), else as they are."""
    check_tensor(OP, "hidden", hidden)
    check_tensor(OP, "weight", weight)
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, weight
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype)


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    max_valid: int | None,
    memory_budget: int | None,
) -> None:
    """Raises TypeError or ValueError unless hidden (..., H), weight (V, H) and target (...) belong together."""
    check_tensor(op, "target", target)
    check_dtype(op, "hidden", hidden)
    check_same_dtype(op, "weight", weight, "hidden", hidden)
    check_dtype(op, "target", target, TARGETS)
    if hidden.dim() < 2:
        raise ValueError(f"{op}: hidden must have shape (..., H); received {tuple(hidden.shape)}")
    check_ndim(op, "weight", weight, 2)
    check_shape(op, "weight", weight, ("V", hidden.shape[-1]))
    check_shape(op, "target", target, tuple(hidden.shape[:-1]))
    check_same_device(op, hidden=hidden, weight=weight, target=target)
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one row; received {tuple(weight.shape)}")
    if max_valid is not None and max_valid < 0:
        raise ValueError(f"{op}: max_valid must not be negative; received {max_valid}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"{op}: memory_budget must be a positive number of bytes; received {memory_budget}")
