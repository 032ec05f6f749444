"""Cross-entropy over rows of logits, vocabularies to 256K and beyond.

    z    = softcap * tanh(logit_scale * x / softcap)        (z = logit_scale * x without a soft-cap)
    lse  = log sum_j exp(z_j)
    nll  = (1 - eps) (lse - z_t) + eps (lse - mean_j z_j) + w lse^2
    loss = sum of nll over the rows whose target is not ignore_index / max(divisor, 1)

    d nll / d z_j = softmax_j (1 + 2 w lse) - (1 - eps) [j = t] - eps / V

The forward reads the logits once; the backward reads them again and writes the gradient. With ``inplace_gradient``
one launch does both: the second read comes from the L2 cache and the gradient replaces the logits, so device memory
sees one read and one write in all. Kernels and their source: ops/_vocabulary_rows.py. Label smoothing: Szegedy et al.
2016; z-loss: Chowdhery et al. 2022 (PaLM), section 5; soft-cap: Gemma 2 report (arXiv:2408.00118), section 2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels import reference
from dropforge_kernels.checks import check_choice, check_dtype, check_ndim, check_same_device, check_shape, check_tensor
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._common import processors
from dropforge_kernels.ops._row_losses import RowLoss, reduce_loss, row_gradient, row_loss
from dropforge_kernels.reference.cross_entropy import REDUCTIONS

OP = "cross_entropy"
TARGETS = frozenset({torch.int64, torch.int32})


@triton.jit
def scale_unless_one_kernel(x_ptr, upstream_ptr, numel, BLOCK: tl.constexpr):
    """x *= upstream[0], in place; returns at once where upstream is 1, so that the usual backward costs no pass and
    no host wait. Programs walk over x: starting one for every block would take longer than the check.
    """
    upstream = tl.load(upstream_ptr)
    if upstream != 1.0:
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, stride):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32) * upstream
            tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < numel)


def check_loss_options(
    op: str, *, logit_scale: float, logit_softcap: float, label_smoothing: float = 0.0, z_loss_weight: float = 0.0
) -> None:
    """Raises ValueError for an option outside its range."""
    if not logit_scale > 0:
        raise ValueError(f"{op}: logit_scale must be positive; received {logit_scale!r}")
    if not logit_softcap >= 0:
        raise ValueError(f"{op}: logit_softcap must be positive, or 0 for none; received {logit_softcap!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1); received {label_smoothing!r}")
    if not z_loss_weight >= 0:
        raise ValueError(f"{op}: z_loss_weight must not be negative; received {z_loss_weight!r}")


def items_tensor(op: str, items: torch.Tensor | float | None, device: torch.device) -> torch.Tensor | None:
    """num_items_in_batch as a tensor of one value on ``device``; no host wait. Raises ValueError for more values than
    one.
    """
    if items is None:
        return None
    if isinstance(items, torch.Tensor):
        if items.numel() != 1:
            raise ValueError(f"{op}: num_items_in_batch must be one number; received shape {tuple(items.shape)}")
        return items.to(device, non_blocking=True)
    return torch.full((1,), float(items), dtype=torch.float32, device=device)


@torch.library.custom_op("dropforge::cross_entropy", mutates_args=())
def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    num_items: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    label_smoothing: float,
    z_loss_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, lse of each row, 1 / divisor), all fp32; logits (N, V), target (N,)."""
    rule = RowLoss(ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight)
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(nll)
    row_loss(logits, target, rule, nll=nll, lse=lse)
    if reduction == "none":
        return nll, lse, torch.ones((), dtype=torch.float32, device=logits.device)
    loss, scale = reduce_loss(nll, target, ignore_index=ignore_index, reduction=reduction, num_items=num_items)
    return loss, lse, scale


@_forward.register_fake
def _(logits, target, num_items, reduction, ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight):
    rows = logits.new_empty((logits.shape[0],), dtype=torch.float32)
    scalar = logits.new_empty((), dtype=torch.float32)
    return rows if reduction == "none" else scalar, torch.empty_like(rows), torch.empty_like(scalar)


@torch.library.custom_op("dropforge::cross_entropy_backward", mutates_args=())
def _backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    scale: torch.Tensor,
    upstream: torch.Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    label_smoothing: float,
    z_loss_weight: float,
) -> torch.Tensor:
    """d loss / d logits in the logits' dtype, contiguous; ``scale`` and ``upstream`` as in the forward."""
    rule = RowLoss(ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    row_gradient(logits, target, rule, lse=lse, upstream=(upstream * scale).contiguous(), out=out)
    return out


@_backward.register_fake
def _(logits, target, lse, scale, upstream, ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx, inputs, output) -> None:
    logits, target, _, _, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, output[1], output[2])


def _differentiate(ctx, d_loss, d_lse, d_scale):
    if d_loss is None:
        return (None,) * 9
    logits, target, lse, scale = ctx.saved_tensors
    return (_backward(logits, target, lse, scale, d_loss, *ctx.options), *(None,) * 8)


_forward.register_autograd(_differentiate, setup_context=_save)


class _InPlace(torch.autograd.Function):
    """Loss and gradient in one launch, the gradient where the logits were."""

    @staticmethod
    def forward(ctx, logits, target, num_items, reduction, rule) -> torch.Tensor:
        buffer = logits.detach()
        nll = torch.empty(buffer.shape[0], dtype=torch.float32, device=buffer.device)
        lse = torch.empty_like(nll)
        arguments = {"ignore_index": rule.ignore_index, "reduction": reduction, "num_items": num_items}
        _, scale = reduce_loss(None, target, **arguments)  # the divisor, which the gradient contains
        row_loss(buffer, target, rule, nll=nll, lse=lse, gradient=True, upstream=scale)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits for its own backward is told
        loss, _ = reduce_loss(nll, target, **arguments)
        ctx.gradient = buffer
        return loss

    @staticmethod
    def backward(ctx, d_loss) -> tuple[torch.Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "cross_entropy: a second backward through inplace_gradient=True; "
                "its gradient was handed out by the first. "
                "Use inplace_gradient=False where the graph is retained"
            )
        if gradient.numel():
            grid = (min(8 * processors(gradient.device), triton.cdiv(gradient.numel(), 8192)),)
            scale_unless_one_kernel[grid](gradient, d_loss, gradient.numel(), BLOCK=8192, num_warps=8)
        return gradient, None, None, None, None


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: torch.Tensor | float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    inplace_gradient: bool = False,
) -> torch.Tensor:
    """Cross-entropy of logits; the formula is at the top of this file.

    Equals ``F.cross_entropy(logits.float(), target, label_smoothing=...)`` with scale, soft-cap and z-loss left out,
    except that a batch without counted targets gives 0 instead of NaN.

    logits: (..., V) bf16, fp16 or fp32, any strides (a last stride other than 1 is copied). target: (...) int64 or
    int32. reduction: "mean" over counted rows, "sum", "none" (result (...)). num_items_in_batch: a number or
    one-element tensor that replaces the divisor of "mean" and "sum". Result: fp32; all statistics fp32; under
    autocast the logits' dtype stays. inplace_gradient: the logits' memory is overwritten with their gradient in the
    forward ("mean" and "sum" only; ignored under torch.compile and where no gradient is needed); a second backward
    then raises. Saved for backward: logits and one fp32 per row, or nothing but the overwritten logits. A target
    outside [0, V) that is not ignore_index makes the loss NaN on the GPU (no host wait) and raises IndexError on the
    CPU. Raises TypeError and ValueError for wrong dtypes, shapes, devices and options."""
    _check(logits, target, reduction, num_items_in_batch)
    options = (ignore_index, logit_scale, logit_softcap, label_smoothing, z_loss_weight)
    check_loss_options(
        OP,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
    )
    if choose(OP, logits, target).backend is Backend.REFERENCE:
        return reference.cross_entropy(
            logits,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            label_smoothing=label_smoothing,
            z_loss_weight=z_loss_weight,
        )
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
    flat = target.reshape(-1).contiguous()
    items = items_tensor(OP, num_items_in_batch, logits.device)
    in_place = inplace_gradient and reduction != "none" and not torch.compiler.is_compiling()
    if in_place and torch.is_grad_enabled() and logits.requires_grad:
        packed = rows if rows.is_contiguous() else rows.contiguous()
        return _InPlace.apply(packed, flat, items, reduction, RowLoss(*options))
    loss, _, _ = _forward(rows, flat, items, reduction, *options)
    return loss.view(target.shape) if reduction == "none" else loss


def _check(
    logits: torch.Tensor, target: torch.Tensor, reduction: str, num_items_in_batch: torch.Tensor | float | None
) -> None:
    check_tensor(OP, "logits", logits)
    check_tensor(OP, "target", target)
    check_dtype(OP, "logits", logits)
    check_dtype(OP, "target", target, TARGETS)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{OP}: logits must have shape (..., V) with V at least 1; received {tuple(logits.shape)}")
    check_ndim(OP, "target", target, logits.dim() - 1)
    check_shape(OP, "target", target, tuple(logits.shape[:-1]))
    check_same_device(OP, logits=logits, target=target)
    check_choice(OP, "reduction", reduction, REDUCTIONS)
    if reduction == "none" and num_items_in_batch is not None:
        raise ValueError(f"{OP}: num_items_in_batch needs reduction 'mean' or 'sum'; received 'none'")
