"""Losses of the GRPO family from log-probabilities (ops/linear_logprobs.py gives those), one launch for value and
gradient.

Legend: B sequences, T tokens; everything below only over tokens with mask 1; advantage a_b per sequence.

    level "token":     r_bt = exp(logp_bt - old_bt)
    level "sequence":  r_b  = exp(mean_t (logp_bt - old_bt))                                   (GSPO)
    l_bt = s_bt + beta k_bt
    s_bt = -min(min(r, delta) a, clip(r, 1 - epsilon, 1 + epsilon_high) a)                     (clipped surrogate)
           -constant(min(r, epsilon_high)) a logp_bt                                           (cispo)
           -constant(phi_b) a logp_bt,    phi = w^k exp(lambda (1 - w)), w_b = exp(sum_t (logp - old))  (vespo)
           -4 / tau sigmoid(tau (r - 1)) a,    tau one of two temperatures: a > 0, a <= 0      (sapo)
    k_bt = exp(ref_bt - logp_bt) - (ref_bt - logp_bt) - 1                                      (k3 estimator of KL to
    the reference)

    grpo     mean over b of (sum_t l_bt / tokens_b)          dr_grpo  sum l / (B max_completion_length)
    sapo     as grpo                                         luspo    mean over b of sum_t l_bt
    bnpo     sum l / tokens of this batch                    dapo, cispo, vespo   sum l / num_items_in_batch
    (default: tokens of this batch)

Exponents are clamped to +-20, divisors are at least 1, masked tokens never enter an exponential. Sources:
DeepSeekMath (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476), GSPO (arXiv:2507.18071),
two-sided clipping: INTELLECT-2 (arXiv:2505.07291), CISPO: MiniMax-M1 (arXiv:2506.13585), SAPO (arXiv:2511.20347),
LUSPO (arXiv:2602.05261), VESPO (arXiv:2602.10693); names as in TRL's GRPOConfig."""

from __future__ import annotations

import torch
import triton

from dropforge_kernels import reference
from dropforge_kernels.checks import (
    check_choice,
    check_dtype,
    check_ndim,
    check_same_device,
    check_same_shape,
    check_shape,
    check_tensor,
)
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._policy_kernels import policy_loss_kernel
from dropforge_kernels.ops.cross_entropy import items_tensor
from dropforge_kernels.ops.linear_cross_entropy import scale_gradient
from dropforge_kernels.reference.grpo_loss import LEVELS, LOSS_TYPES, GrpoLoss, ratio_bounds

OP = "grpo_loss"
MASKS = frozenset({torch.bool, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32})


@torch.library.custom_op("dropforge::grpo_loss", mutates_args=())
def _forward(
    logprobs: torch.Tensor,
    old: torch.Tensor | None,
    ref: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    items: torch.Tensor | None,
    loss_type: str,
    sequence: bool,
    low: float,
    high: float,
    delta: float | None,
    beta: float,
    max_completion_length: int,
    tau_positive: float,
    tau_negative: float,
    k_positive: float,
    k_negative: float,
    decay_positive: float,
    decay_negative: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, means (3), 1 / divisor, undivided gradient (B, T) fp32)."""
    batch, length = logprobs.shape
    gradient = torch.empty((batch, length), dtype=torch.float32, device=logprobs.device)
    sums = torch.empty((batch, 5), dtype=torch.float32, device=logprobs.device)
    if batch:
        policy_loss_kernel[(batch,)](
            logprobs,
            old if old is not None else logprobs,
            ref if ref is not None else logprobs,
            advantages,
            mask,
            gradient,
            sums,
            length,
            low,
            high,
            delta if delta is not None else 0.0,
            beta,
            tau_positive,
            tau_negative,
            k_positive,
            k_negative,
            decay_positive,
            decay_negative,
            HAS_OLD=old is not None,
            HAS_REF=ref is not None,
            HAS_DELTA=delta is not None,
            SEQUENCE=sequence,
            PER_SEQUENCE_MEAN=loss_type in ("grpo", "sapo"),
            SURROGATE=loss_type if loss_type in ("cispo", "sapo", "vespo") else "clipped",
            BLOCK=min(1024, triton.next_power_of_2(max(16, length))),
            num_warps=4,
        )
    totals = sums.sum(0)
    share = totals[1].clamp_min(1)
    if loss_type in ("grpo", "sapo", "luspo", "dr_grpo"):
        divisor = batch * max_completion_length if loss_type == "dr_grpo" else batch
        scale = torch.full_like(share, 1.0 / max(1, divisor))
    else:
        scale = (share if items is None else items.reshape(()).float().clamp_min(1)).reciprocal()
    return totals[0] * scale, totals[2:] / share, scale, gradient


@_forward.register_fake
def _(logprobs, *_: object):
    scalar = logprobs.new_empty((), dtype=torch.float32)
    means = logprobs.new_empty((3,), dtype=torch.float32)
    return scalar, means, torch.empty_like(scalar), logprobs.new_empty(logprobs.shape, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], output[3])


def _differentiate(ctx, d_loss, *_: object):
    if d_loss is None:
        return (None,) * 19
    scale, gradient = ctx.saved_tensors
    return (scale_gradient(gradient, scale, d_loss, ctx.dtype, 1), *(None,) * 18)


_forward.register_autograd(_differentiate, setup_context=_save)


def grpo_loss(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    max_completion_length: int | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_pos: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> GrpoLoss:
    """Loss of the GRPO family; formulas at the top of this file. Differentiable in ``logprobs`` only.

    logprobs, old_logprobs (None: the current ones, ratio 1), ref_logprobs (needed with beta > 0): (B, T) bf16, fp16
    or fp32, of the completion tokens. advantages: (B) float. mask: (B, T), non-zero where a token counts; values
    elsewhere may be anything, NaN too. importance_sampling_level "sequence" with loss_type "grpo" is GSPO.
    max_completion_length: for dr_grpo. num_items_in_batch: for dapo, cispo and vespo. epsilon_high with cispo: the
    greatest weight itself (5.0 is common), needed. Returns GrpoLoss, all fp32 scalars, kl and the clipped shares
    detached (cispo clips from above only, sapo and vespo nothing). Accumulation fp32; saved for backward: the
    gradient. No host wait; can be captured. Raises TypeError and ValueError for wrong dtypes, shapes, devices and
    options."""
    high = epsilon if epsilon_high is None else epsilon_high
    _check(logprobs, advantages, mask, old_logprobs, ref_logprobs)
    _check_options(
        loss_type, importance_sampling_level, epsilon, high, delta, beta, ref_logprobs, max_completion_length
    )
    _check_variants(loss_type, epsilon_high, delta, sapo_temperature_pos, sapo_temperature_neg)
    _check_gamma(vespo_k_pos, vespo_k_neg, vespo_lambda_pos, vespo_lambda_neg)
    if choose(OP, logprobs, advantages, mask, old_logprobs, ref_logprobs).backend is Backend.REFERENCE:
        return reference.grpo_loss(
            logprobs,
            advantages,
            mask,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            loss_type=loss_type,
            importance_sampling_level=importance_sampling_level,
            epsilon=epsilon,
            epsilon_high=high,
            delta=delta,
            beta=beta,
            max_completion_length=max_completion_length,
            num_items_in_batch=num_items_in_batch,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_lambda_neg=vespo_lambda_neg,
        )
    items = items_tensor(OP, num_items_in_batch, logprobs.device) if loss_type in ("dapo", "cispo", "vespo") else None
    low, high = ratio_bounds(loss_type, epsilon, high)
    loss, means, _, _ = _forward(
        logprobs.contiguous(),
        None if old_logprobs is None else old_logprobs.detach().contiguous(),
        None if ref_logprobs is None or beta == 0 else ref_logprobs.detach().contiguous(),
        advantages.detach().contiguous(),
        mask.contiguous(),
        items,
        loss_type,
        importance_sampling_level == "sequence",
        low,
        high,
        delta,
        beta,
        max_completion_length or 0,
        sapo_temperature_pos,
        sapo_temperature_neg,
        vespo_k_pos,
        vespo_k_neg,
        vespo_lambda_pos,
        vespo_lambda_neg,
    )
    return GrpoLoss(loss, *means.detach().unbind())


def _check(logprobs, advantages, mask, old, ref):
    for name, tensor in (("logprobs", logprobs), ("advantages", advantages), ("mask", mask)):
        check_tensor(OP, name, tensor)
    check_dtype(OP, "logprobs", logprobs)
    check_ndim(OP, "logprobs", logprobs, 2)
    check_dtype(OP, "advantages", advantages)
    check_shape(OP, "advantages", advantages, (logprobs.shape[0],))
    check_dtype(OP, "mask", mask, MASKS)
    check_same_shape(OP, "mask", mask, "logprobs", logprobs)
    for name, tensor in (("old_logprobs", old), ("ref_logprobs", ref)):
        if tensor is not None:
            check_dtype(OP, name, tensor)
            check_same_shape(OP, name, tensor, "logprobs", logprobs)
    check_same_device(OP, logprobs=logprobs, advantages=advantages, mask=mask, old_logprobs=old, ref_logprobs=ref)


def _check_options(loss_type, level, low, high, delta, beta, ref, max_completion_length):
    check_choice(OP, "loss_type", loss_type, LOSS_TYPES)
    check_choice(OP, "importance_sampling_level", level, LEVELS)
    if not 0 <= low <= 1 or not high >= 0:
        raise ValueError(f"{OP}: epsilon must be in [0, 1] and epsilon_high not negative; received {low} and {high}")
    if delta is not None and not delta > 1 + high:
        raise ValueError(f"{OP}: delta must be above 1 + epsilon_high = {1 + high}; received {delta}")
    if not beta >= 0:
        raise ValueError(f"{OP}: beta must not be negative; received {beta}")
    if beta > 0 and ref is None:
        raise ValueError(f"{OP}: beta above 0 needs ref_logprobs; received None")
    if loss_type == "dr_grpo" and not max_completion_length:
        raise ValueError(f"{OP}: loss_type 'dr_grpo' needs max_completion_length; received {max_completion_length}")


def _check_variants(loss_type, epsilon_high, delta, tau_positive, tau_negative):
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError(f"{OP}: loss_type 'cispo' needs epsilon_high, the greatest weight; received None")
    if loss_type in ("cispo", "sapo", "vespo") and delta is not None:
        raise ValueError(f"{OP}: delta belongs to the clipped surrogate, not to {loss_type!r}; received {delta}")
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"{OP}: the temperatures must be positive; received {tau_positive} and {tau_negative}")


def _check_gamma(*values: float) -> None:
    if not all(value > 0 for value in values):
        raise ValueError(f"{OP}: vespo's k and lambda must be positive; received {', '.join(map(str, values))}")
