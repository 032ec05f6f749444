"""Log-probabilities of chosen tokens, and entropies, from hidden states and a head, without ever forming the full
logits.

    z = softcap(logit_scale * hidden @ weight.T)      logprob = z_t - lse(z)      entropy = lse(z) - sum_j softmax_j z_j

(logit_scale = 1 / temperature.) Same chunks as linear_cross_entropy (ops/_head_chunks.py). Two ways to the gradient:

- frozen head, entropy only reported: d logprob_i / d hidden_i = (e_t - softmax) W is one vector of H values per row,
  whatever its
  upstream turns out to be. The forward stores it and the backward scales each row: 4 N H V FLOP.
- trained head or differentiated entropy: the backward computes the logits again: 6 N H V FLOP, plus 2 N H V for d
  weight."""

from __future__ import annotations

import torch

from dropforge_kernels import reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._head_chunks import FROZEN_BUDGET, TRAINED_BUDGET, Head, chunk_rows, row_chunks
from dropforge_kernels.ops._row_losses import RowLoss, row_gradient, row_loss
from dropforge_kernels.ops.cross_entropy import check_loss_options
from dropforge_kernels.ops.linear_cross_entropy import autocast_pair, check_head, scale_gradient
from dropforge_kernels.reference.linear_logprobs import LogProbs

OP = "linear_logprobs"


@torch.library.custom_op("dropforge::linear_logprobs", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    max_valid: int | None,
    skip_ignored: bool,
    rows_per_chunk: int,
    return_entropy: bool,
    need_jacobian: bool,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs, lse, entropy or empty: fp32 (N,); -d logprob / d hidden (N, H) or empty)."""
    rule = RowLoss(ignore_index, logit_scale, logit_softcap)
    head = Head(hidden, weight, rows_per_chunk, need_hidden=need_jacobian, need_weight=False)
    count = target.numel()
    kinds = 3 if return_entropy else 2
    rows = torch.empty(
        (kinds, rows_per_chunk), dtype=torch.float32, device=hidden.device
    )  # nll, lse, entropy of a chunk
    found = torch.zeros(
        (kinds, count + 1), dtype=torch.float32, device=hidden.device
    )  # the last column takes the padding
    for chunk in row_chunks(
        target, rows_per_chunk, ignore_index=ignore_index, max_valid=max_valid, skip_ignored=skip_ignored
    ):
        part, logits = head.logits_of(chunk)
        values = rows if chunk.index is not None else found[:, chunk.start : chunk.stop]
        values = values[:, : chunk.stop - chunk.start]
        entropy = values[2] if return_entropy else None
        row_loss(logits, chunk.target, rule, nll=values[0], lse=values[1], entropy=entropy, gradient=need_jacobian)
        if chunk.index is not None:
            found.index_copy_(1, chunk.index.long(), values)
        if need_jacobian:
            head.take_gradient(chunk, part, logits)
    logprobs, lse = found[0, :count].neg(), found[1, :count].clone()
    if max_valid is not None and max_valid < count:
        wrong = (
            target != ignore_index
        ).sum() > max_valid  # a bound that left rows out must not pass for log-probabilities
        logprobs = torch.where(wrong, torch.full_like(logprobs, float("nan")), logprobs)
    nothing = lse.new_empty(0)
    jacobian = head.d_hidden if head.d_hidden is not None else hidden.new_empty(0)
    return logprobs, lse, found[2, :count].clone() if return_entropy else nothing, jacobian


@_forward.register_fake
def _(hidden, weight, target, max_valid, skip_ignored, rows_per_chunk, return_entropy, need_jacobian, *_: object):
    rows = hidden.new_empty((target.shape[0],), dtype=torch.float32)
    entropy = torch.empty_like(rows) if return_entropy else rows.new_empty(0)
    return rows, torch.empty_like(rows), entropy, hidden.new_empty(hidden.shape if need_jacobian else (0,))


@torch.library.custom_op("dropforge::linear_logprobs_backward", mutates_args=())
def _backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    d_logprobs: torch.Tensor,
    d_entropy: torch.Tensor | None,
    max_valid: int | None,
    skip_ignored: bool,
    rows_per_chunk: int,
    need_hidden: bool,
    need_weight: bool,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d hidden (N, H) or empty, d weight (V, H) fp32 or empty) by computing the logits again."""
    rule = RowLoss(ignore_index, logit_scale, logit_softcap)
    head = Head(hidden, weight, rows_per_chunk, need_hidden=need_hidden, need_weight=need_weight)
    saved = [lse, d_logprobs] + ([entropy, d_entropy] if d_entropy is not None else [])
    table = torch.cat([torch.stack(saved), lse.new_zeros((len(saved), 1))], dim=1)  # the last column is for the padding
    for chunk in row_chunks(
        target, rows_per_chunk, ignore_index=ignore_index, max_valid=max_valid, skip_ignored=skip_ignored
    ):
        part, logits = head.logits_of(chunk)
        picked = table[:, chunk.start : chunk.stop] if chunk.index is None else table.index_select(1, chunk.index)
        row_gradient(
            logits,
            chunk.target,
            rule,
            lse=picked[0],
            upstream=picked[1],
            out=logits,
            log_probability=True,
            entropy=picked[2] if d_entropy is not None else None,
            entropy_upstream=picked[3] if d_entropy is not None else None,
        )
        head.take_gradient(chunk, part, logits)
    d_hidden = head.d_hidden if head.d_hidden is not None else hidden.new_empty(0)
    return d_hidden, head.d_weight if head.d_weight is not None else lse.new_empty(0)


@_backward.register_fake
def _(
    hidden,
    weight,
    target,
    lse,
    entropy,
    d_logprobs,
    d_entropy,
    max_valid,
    skip,
    rows,
    need_hidden,
    need_weight,
    *_: object,
):
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    return d_hidden, hidden.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    hidden, weight, target, *ctx.chunking = inputs[:6]
    ctx.jacobian, ctx.options = inputs[7], inputs[8:]
    ctx.weight_dtype = weight.dtype
    ctx.set_materialize_grads(False)
    _, lse, entropy, jacobian = output
    ctx.save_for_backward(*((jacobian,) if ctx.jacobian else (hidden, weight, target, lse, entropy)))


def _differentiate(ctx, d_logprobs, d_lse, d_entropy, d_jacobian):
    nothing = (None,) * 9
    if d_logprobs is None and d_entropy is None:
        return None, None, *nothing
    if ctx.jacobian:
        if d_logprobs is None:
            return None, None, *nothing
        (jacobian,) = ctx.saved_tensors
        one = torch.ones((), dtype=torch.float32, device=jacobian.device)
        return scale_gradient(jacobian, one, d_logprobs, jacobian.dtype, -1), None, *nothing
    hidden, weight, target, lse, entropy = ctx.saved_tensors
    upstream = torch.zeros_like(lse) if d_logprobs is None else d_logprobs
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = _backward(
        hidden, weight, target, lse, entropy, upstream, d_entropy, *ctx.chunking, need_hidden, need_weight, *ctx.options
    )
    return d_hidden if need_hidden else None, d_weight.to(ctx.weight_dtype) if need_weight else None, *nothing


_forward.register_autograd(_differentiate, setup_context=_save)


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    return_entropy: bool = False,
    entropy_gradient: bool = False,
    max_valid: int | None = None,
    skip_ignored: bool = True,
    memory_budget: int | None = None,
) -> LogProbs:
    """``log_softmax(logit_scale * hidden @ weight.T).gather(target)`` and its entropy, in chunks; formula at the top
    of this file.

    hidden: (..., H), weight: (V, H), both bf16, fp16 or fp32 (one dtype; under autocast both are cast to its dtype).
    target: (...) int64 or int32. Returns LogProbs(logprobs, entropy or None), fp32 in target's shape; both are 0 (and
    pass no gradient) where the target is ignore_index: mark prompts and padding so, and they are never multiplied
    through the head. entropy_gradient: the entropy is differentiable too (costs a recomputation); otherwise it is
    detached. max_valid, skip_ignored, memory_budget: as linear_cross_entropy; a bound that is too low makes every
    log-probability NaN. Saved for backward: d logprob / d hidden (frozen head), else the inputs and two fp32 per row.
    A target outside [0, V) gives NaN. Raises TypeError and ValueError for wrong dtypes, shapes, devices and options.
    """
    hidden, weight = autocast_pair(hidden, weight)
    check_head(OP, hidden, weight, target, max_valid=max_valid, memory_budget=memory_budget)
    check_loss_options(OP, logit_scale=logit_scale, logit_softcap=logit_softcap)
    if choose(OP, hidden, weight, target).backend is Backend.REFERENCE:
        return reference.linear_logprobs(
            hidden,
            weight,
            target,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_entropy=return_entropy,
            entropy_gradient=entropy_gradient,
        )
    grad = torch.is_grad_enabled()
    trained = grad and weight.requires_grad
    jacobian = grad and hidden.requires_grad and not trained and not (return_entropy and entropy_gradient)
    flat = target.reshape(-1).contiguous()
    bound = flat.numel() if max_valid is None else min(max_valid, flat.numel())
    budget = memory_budget or (TRAINED_BUDGET if trained else FROZEN_BUDGET)
    rows = chunk_rows(bound, weight.shape[0], hidden.element_size(), budget)
    states = hidden.reshape(-1, hidden.shape[-1])
    options = (ignore_index, logit_scale, logit_softcap)
    logprobs, _, entropy, _ = _forward(
        states, weight, flat, max_valid, skip_ignored, rows, return_entropy, jacobian, *options
    )
    if not return_entropy:
        return LogProbs(logprobs.view(target.shape), None)
    entropy = entropy if entropy_gradient else entropy.detach()
    return LogProbs(logprobs.view(target.shape), entropy.view(target.shape))
