"""RMSNorm of every head of q and k in one launch, alone (``qk_norm``) or followed by RoPE (``qk_norm_rope``).

Legend and rotation: see ``rope``. With n = x / sqrt(mean over D of x^2 + eps), separately for every head:

Forward:   y = rotate(n * (offset + weight))
Backward:  g = rotate back(dy);   dweight = sum over tokens and heads of g * n
           dx = rstd * (g * w - n * mean(g * w * n)) with w = offset + weight
Source: Henry et al. 2020 (arXiv 2010.04245) in the RMSNorm form of Qwen3 and Gemma 3.
"""

from __future__ import annotations

import torch

from dropforge_kernels import checks, reference
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._common import register
from dropforge_kernels.ops._heads import launch_forward, launch_norm_backward
from dropforge_kernels.ops.rms_norm import ROUNDINGS
from dropforge_kernels.ops.rope import check_heads, check_table


def _forward_op(q, k, q_weight, k_weight, cos, sin, positions, eps, offset, llama, interleaved):
    return launch_forward(
        q,
        k,
        weights=(q_weight, k_weight),
        eps=eps,
        offset=offset,
        llama=llama,
        table=None if cos is None else (cos, sin),
        positions=positions,
        interleaved=interleaved,
    )


def _backward(dq, dk, q, k, q_weight, k_weight, cos, sin, positions, eps, offset, interleaved, weight_gradient):
    return launch_norm_backward(
        dq,
        dk,
        q,
        k,
        (q_weight, k_weight),
        eps=eps,
        offset=offset,
        weight_gradient=weight_gradient,
        table=None if cos is None else (cos, sin),
        positions=positions,
        interleaved=interleaved,
    )


def _backward_op(*arguments: object):
    dq, dk, dq_weight, dk_weight = _backward(*arguments)
    if dq_weight is None:
        return dq, dk, dq.new_empty(0), dq.new_empty(0)
    return dq, dk, dq_weight, dk_weight


def _forward_fake(q, k, *_: object):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _backward_fake(dq, dk, q, k, q_weight, k_weight, cos, sin, positions, eps, offset, interleaved, weight_gradient):
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    if weight_gradient:
        return *outputs, torch.empty_like(q_weight), torch.empty_like(k_weight)
    return *outputs, q.new_empty(0), q.new_empty(0)


_TENSORS = "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? positions"
_FORWARD = register(
    "qk_norm_rope",
    f"({_TENSORS}, float eps, float offset, bool llama, bool interleaved) -> (Tensor, Tensor)",
    _forward_op,
    _forward_fake,
)
_BACKWARD = register(
    "qk_norm_rope_backward",
    f"(Tensor dq, Tensor dk, {_TENSORS}, float eps, float offset, bool interleaved, bool weight_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)


class _QKNormRope(torch.autograd.Function):
    """Eager form: saves q and k as they came in, the weights, and the tables."""

    @staticmethod
    def forward(
        ctx, q, k, q_weight, k_weight, cos, sin, positions, eps, offset, llama, interleaved
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, positions)
        ctx.options = (eps, offset, interleaved)
        return _forward_op(q, k, q_weight, k_weight, cos, sin, positions, eps, offset, llama, interleaved)

    @staticmethod
    def backward(ctx, dq, dk) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        return *_backward(dq, dk, *ctx.saved_tensors, *ctx.options, wanted), *(None,) * 7


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    eps, offset, _, interleaved = inputs[7:]
    ctx.options = (eps, offset, interleaved)


def _compiled_backward(ctx, dq, dk):
    wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dq, dk, dq_weight, dk_weight = _BACKWARD(dq, dk, *ctx.saved_tensors, *ctx.options, wanted)
    weights = (dq_weight, dk_weight) if wanted else (None, None)
    return dq, dk, *weights, *(None,) * 7


_FORWARD.register_autograd(_compiled_backward, setup_context=_setup)


def _check(op, q, k, q_weight, k_weight, eps, rounding):
    check_heads(op, q, k)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: q_weight and k_weight must both be given or both be None; received one of them")
    if q_weight is not None:
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            checks.check_dtype(op, name, weight)
            checks.check_shape(op, name, weight, (q.shape[-1],))
            if not weight.is_contiguous():
                raise ValueError(f"{op}: {name} must be contiguous; received stride {weight.stride()}")
    checks.check_positive(op, "eps", eps)
    checks.check_choice(op, "rounding", rounding, ROUNDINGS)


def qk_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    rounding: str = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm`` of every head of q and of k, one launch for both.

    q, k: as in ``rope``. q_weight, k_weight: (D,), contiguous, or both None. eps, offset, rounding: as in
    ``rms_norm``. Returns new contiguous (q, k). fp32 inside. Saved for backward: q, k and the weights; the weights'
    gradients are computed only when one of them needs it. Raises TypeError or ValueError for wrong dtypes, shapes,
    devices, options.
    """
    _check("qk_norm", q, k, q_weight, k_weight, eps, rounding)
    if choose("qk_norm", q, k, q_weight, k_weight).backend is Backend.REFERENCE:
        return reference.qk_norm(q, k, q_weight, k_weight, eps=eps, offset=offset, rounding=rounding)
    apply = _FORWARD if torch.compiler.is_compiling() else _QKNormRope.apply
    return apply(q, k, q_weight, k_weight, None, None, None, eps, offset, rounding == "llama", False)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounding: str = "llama",
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rope(*qk_norm(q, k, q_weight, k_weight), cos, sin)`` in one launch, and one launch in backward.

    Arguments as in ``qk_norm`` and ``rope``. The normed values are rounded to q's dtype before the rotation, as two
    separate operations would. Returns new contiguous (q, k). Saved for backward: q, k, weights, tables, positions.
    """
    _check("qk_norm_rope", q, k, q_weight, k_weight, eps, rounding)
    cos, sin, positions = check_table("qk_norm_rope", q, cos, sin, positions)
    flavour = {"eps": eps, "offset": offset, "rounding": rounding}
    if choose("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, positions).backend is Backend.REFERENCE:
        where = {"positions": positions, "interleaved": interleaved}
        return reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, **flavour, **where)
    apply = _FORWARD if torch.compiler.is_compiling() else _QKNormRope.apply
    return apply(q, k, q_weight, k_weight, cos, sin, positions, eps, offset, rounding == "llama", interleaved)
