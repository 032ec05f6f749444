"""Launchers of the kernels in _vocabulary_rows, with the sizes chosen by rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from dropforge_kernels.ops._shared_rows import shared_row_loss
from dropforge_kernels.ops._vocabulary_rows import (
    WIDTH,
    lanes_for,
    reduce_loss_kernel,
    row_gradient_kernel,
    row_loss_kernel,
)

SHARED_LIMIT, SHARED_PART, SHARED_WARPS, SHARED_GROUPS = 16384, 16384, 8, (2, 1)
"""Loss and gradient in one launch on a GPU: rows above SHARED_LIMIT values are shared by programs of SHARED_PART.
Warps, and groups of WIDTH values that a thread reads at a time in the first and second pass. Best of a sweep of 36 on
an H200 over vocabularies of 128K to 262K.
"""


class RowLoss(NamedTuple):
    """What turns a row of logits into its loss; see _vocabulary_rows for the formula."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0


def row_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    rule: RowLoss,
    *,
    nll: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None = None,
    gradient: bool = False,
    upstream: torch.Tensor | None = None,
) -> None:
    """Fills nll, lse and entropy (fp32, (N,)); with ``gradient`` also overwrites the logits (N, V) with d nll / d
    logits * upstream.
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    if gradient and vocabulary > SHARED_LIMIT and logits.is_cuda:
        shared_row_loss(
            logits, target, rule, nll=nll, lse=lse, entropy=entropy, upstream=upstream, part=SHARED_PART,
            warps=SHARED_WARPS, groups=SHARED_GROUPS,
        )  # fmt: skip
        return
    # One program per row.
    warps, groups, groups_out = (8 if vocabulary > 4096 else 4), 2, 1
    row_loss_kernel[(rows,)](
        logits,
        logits,
        target,
        nll,
        lse,
        entropy if entropy is not None else nll,
        upstream if upstream is not None else nll,
        logits.stride(0),
        vocabulary,
        rule.ignore_index,
        rule.logit_scale,
        rule.logit_softcap,
        rule.label_smoothing,
        rule.z_loss_weight,
        HAS_SOFTCAP=rule.logit_softcap > 0,
        NEED_SUM=rule.label_smoothing > 0,
        NEED_ENTROPY=entropy is not None,
        WRITE_GRADIENT=gradient,
        HAS_UPSTREAM=upstream is not None,
        LANES=lanes_for(vocabulary, warps, groups),
        LANES_OUT=lanes_for(vocabulary, warps, groups_out),
        WIDTH=WIDTH,
        num_warps=warps,
    )


def row_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    rule: RowLoss,
    *,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    out: torch.Tensor,
    log_probability: bool = False,
    entropy: torch.Tensor | None = None,
    entropy_upstream: torch.Tensor | None = None,
) -> None:
    """Writes upstream * d nll / d logits to ``out`` (may be the logits); with ``log_probability`` d log p instead,
    plus the entropy's part.

    upstream: fp32, one value or one per row.
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    lanes = lanes_for(vocabulary, 4)
    has_entropy = entropy is not None and entropy_upstream is not None
    row_gradient_kernel[(rows, triton.cdiv(vocabulary, lanes * WIDTH))](
        logits,
        out,
        target,
        lse,
        entropy if has_entropy else lse,
        upstream,
        entropy_upstream if has_entropy else lse,
        logits.stride(0),
        out.stride(0),
        0 if upstream.numel() == 1 else 1,
        vocabulary,
        rule.ignore_index,
        rule.logit_scale,
        rule.logit_softcap,
        rule.label_smoothing,
        rule.z_loss_weight,
        SIGN=-1 if log_probability else 1,
        HAS_SOFTCAP=rule.logit_softcap > 0,
        HAS_ENTROPY=has_entropy,
        LANES=lanes,
        WIDTH=WIDTH,
        num_warps=4,
    )


def reduce_loss(
    nll: torch.Tensor | None,
    target: torch.Tensor,
    *,
    ignore_index: int,
    reduction: str,
    num_items: torch.Tensor | None,
    limit: int | None = None,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, scale), both fp32 scalars: scale = 1 / divisor, loss = scale * sum(nll) (0 where nll is None). ``count``
    (fp32 scalar) receives the number of targets that count. Nothing waits for the GPU.
    """
    loss, scale = torch.zeros(2, dtype=torch.float32, device=target.device).unbind() if nll is None else _two(target)
    reduce_loss_kernel[(1,)](
        nll if nll is not None else scale,
        target,
        num_items if num_items is not None else scale,
        loss,
        scale,
        count if count is not None else scale,
        target.numel(),
        target.numel() if limit is None else limit,
        ignore_index,
        MEAN=reduction == "mean",
        HAS_ITEMS=num_items is not None,
        SUM_LOSS=nll is not None,
        STORE_COUNT=count is not None,
        BLOCK=4096,
        num_warps=8,
    )
    return loss, scale


def _two(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty((), dtype=torch.float32, device=like.device),
        torch.empty((), dtype=torch.float32, device=like.device),
    )
