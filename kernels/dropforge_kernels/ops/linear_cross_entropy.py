"""Cross-entropy of hidden states through a head, without ever forming the full logits.

    loss = cross_entropy(hidden @ weight.T + bias, target, ...)         (formula: ops/cross_entropy.py)

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
from dropforge_kernels.ops._head_chunks import (
    FROZEN_BUDGET,
    TRAINED_BUDGET,
    WORTH_WAITING,
    Head,
    chunk_rows,
    row_chunks,
    scale_rows,
)
from dropforge_kernels.ops._row_losses import RowLoss, reduce_loss, row_loss
from dropforge_kernels.ops.cross_entropy import TARGETS, check_loss_options, items_tensor

OP = "linear_cross_entropy"


@torch.library.custom_op("dropforge::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    bias: torch.Tensor | None,
    reduction: str,
    max_valid: int | None,
    skip_ignored: bool,
    rows_per_chunk: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    label_smoothing: float,
    z_loss_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, number of targets that count, 1 / divisor, sum of nll's gradient to hidden (N, H), weight (V, H) fp32 and
    bias (V) fp32; each empty if not needed).
    """
    rule = RowLoss(ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight)
    head = Head(
        hidden, weight, rows_per_chunk, need_hidden=need_hidden, need_weight=need_weight, bias=bias, need_bias=need_bias
    )
    nll = torch.zeros(target.numel(), dtype=torch.float32, device=hidden.device)
    lse = torch.empty(rows_per_chunk, dtype=torch.float32, device=hidden.device)
    backward = need_hidden or need_weight or need_bias
    much = 4 * hidden.numel() * weight.shape[0] >= WORTH_WAITING
    for chunk in row_chunks(
        target, rows_per_chunk, ignore_index=ignore_index, max_valid=max_valid, skip_ignored=skip_ignored, wait=much
    ):
        part, logits = head.logits_of(chunk)
        rows = chunk.stop - chunk.start
        # compacted rows leave nll's tail at zero: only the sum is used
        row_loss(logits, chunk.target, rule, nll=nll[chunk.start : chunk.stop], lse=lse[:rows], gradient=backward)
        if backward:
            head.take_gradient(chunk, part, logits)
    count = torch.empty((), dtype=torch.float32, device=hidden.device)
    loss, scale = reduce_loss(
        nll, target, ignore_index=ignore_index, reduction=reduction, num_items=num_items, limit=max_valid, count=count
    )
    d_hidden = head.d_hidden if head.d_hidden is not None else hidden.new_empty(0)
    d_weight, d_bias = (nll.new_empty(0) if d is None else d for d in (head.d_weight, head.d_bias))
    return loss, count, scale, d_hidden, d_weight, d_bias


@_forward.register_fake
def _(
    hidden,
    weight,
    target,
    num_items,
    bias,
    reduction,
    max_valid,
    skip_ignored,
    rows,
    need_hidden,
    need_weight,
    need_bias,
    *_: object,
):
    scalar = hidden.new_empty((), dtype=torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    d_weight = hidden.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    d_bias = hidden.new_empty(weight.shape[:1] if need_bias else (0,), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), torch.empty_like(scalar), d_hidden, d_weight, d_bias


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
    bias = inputs[4]
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype, None if bias is None else bias.dtype
    ctx.needs = inputs[9:12]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _differentiate(ctx, d_loss, *_: object):
    if d_loss is None:
        return (None,) * 17
    scale, *gradients = ctx.saved_tensors
    to_hidden, to_weight, to_bias = (
        scale_gradient(gradient, scale, d_loss, dtype, 1) if needed else None
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    )
    return (to_hidden, to_weight, None, None, to_bias, *(None,) * 12)


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
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
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """``cross_entropy(hidden @ weight.T + bias, target)`` in chunks of rows; formula and method at the top of this
    file.

    hidden: (..., H), weight: (V, H), bias: (V) or None, all bf16, fp16 or fp32 (one dtype; under autocast all are
    cast to its dtype). target: (...) int64 or int32, already shifted. reduction "mean" or "sum"; num_items_in_batch
    replaces the divisor. Result: fp32 scalar. Gradients reach hidden, and weight and bias where they require them
    (summed in fp32 over chunks). Saved for backward: the gradients. max_valid: an upper bound on the targets that
    count, known on the host; rows beyond it are never computed, nothing waits for the GPU and the call can be
    captured. A bound that is too low makes the loss NaN. Without it the ignored rows are found on the device and
    their number is read on the host while the first chunk runs, before it where there is one large chunk only, and
    not at all where that is small or during capture: then all rows are computed;
    skip_ignored=False computes all rows without waiting. memory_budget: bytes of the logits buffer (default 400 MiB,
    1 GiB with a trained head; ``budget_from_free_memory`` proposes one); at least 16 rows are computed at a time.
    count: one fp32 value on the device that receives the number of targets that count, so that a captured step with
    reduction "sum" can be read back as a mean. A target outside [0, V) makes the loss NaN. Raises TypeError and
    ValueError for wrong dtypes, shapes, devices and options.
    """
    hidden, weight = autocast_pair(hidden, weight)
    check_head(OP, hidden, weight, target, max_valid=max_valid, memory_budget=memory_budget)
    bias = _check_bias(hidden, weight, bias, count)
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
            bias=bias,
            count=count,
        )
    grad = torch.is_grad_enabled()
    needs = [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    flat = target.reshape(-1).contiguous()
    budget = memory_budget or (TRAINED_BUDGET if needs[1] else FROZEN_BUDGET)
    bound = flat.numel() if max_valid is None else min(max_valid, flat.numel())
    rows = chunk_rows(bound, weight.shape[0], hidden.element_size(), budget)
    items = items_tensor(OP, num_items_in_batch, hidden.device)
    states = hidden.reshape(-1, hidden.shape[-1])
    loss, counted, *_ = _forward(
        states, weight, flat, items, bias, reduction, max_valid, skip_ignored, rows, *needs, *options
    )
    if count is not None:
        count.copy_(counted)
    return loss


def _check_bias(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: torch.Tensor | None
) -> torch.Tensor | None:
    """The bias in the dtype of hidden under autocast, else as it is."""
    if count is not None:
        check_tensor(OP, "count", count)
        check_same_device(OP, hidden=hidden, count=count)
        check_shape(OP, "count", count, ())
        check_dtype(OP, "count", count, {torch.float32})
    if bias is None:
        return None
    check_tensor(OP, "bias", bias)
    if torch.is_autocast_enabled(hidden.device.type):
        bias = bias.to(hidden.dtype)
    check_same_dtype(OP, "bias", bias, "hidden", hidden)
    check_shape(OP, "bias", bias, (weight.shape[0],))
    check_same_device(OP, hidden=hidden, bias=bias)
    return bias


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
