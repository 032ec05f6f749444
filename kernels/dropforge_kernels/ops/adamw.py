"""AdamW over one flat parameter buffer in one launch; gradient norm and clipping without waiting for the GPU.

    c = min(1, max_norm / (norm + 1e-6))        g = c * grad          t = completed steps + 1
    m = m + (1 - b1) (g - m)                    v = v + (1 - b2) (g^2 - v)
    param = param (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

All arithmetic fp32. A norm that is not finite leaves everything as it was, the step count too (decided on the
device). 8-bit states: blocks of 256 values share an absmax; a value is the nearest entry of the dynamic map times it.
Entries are computed, not searched or looked up: the map is seven decades of equal cells. A second moment above zero
never rounds to zero (it would make the next step m / eps). Sources: Loshchilov and Hutter 2019 (arXiv:1711.05101);
Dettmers et al. 2022 (arXiv:2110.02861)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from dropforge_kernels import reference
from dropforge_kernels.checks import FLOATS, check_dtype, check_ndim, check_same_device, check_same_shape, check_tensor
from dropforge_kernels.dispatch import Backend, choose
from dropforge_kernels.ops._common import processors
from dropforge_kernels.ops._dynamic_map import decode_tile, encode
from dropforge_kernels.reference.adamw import STATE_BLOCK, AdamWState

OP = "adamw"
TILE = (8, 4)
"""State blocks and warps of a program with 8-bit states: best of a sweep on an H200."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _correction(steps, ln_beta):
    """1 - beta^steps in fp32 without cancellation: a series near beta^steps = 1."""
    y = tl.maximum(steps * ln_beta, -100.0)
    series = -y * (1.0 + y * 0.5 * (1.0 + y * 0.33333333 * (1.0 + y * 0.25 * (1.0 + y * 0.2))))
    return tl.where(y > -0.1, series, 1.0 - tl.exp2(y * LOG2_E))


@triton.jit
def _adamw_kernel(
    param_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    m_absmax_ptr,
    v_absmax_ptr,
    step_ptr,
    norm_ptr,
    lr_ptr,
    copy_ptr,
    numel,
    lr,
    beta1,
    beta2,
    ln_beta1,
    ln_beta2,
    eps,
    weight_decay,
    max_norm,
    EIGHT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CLIP: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    COPY: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A tile of BLOCKS state blocks of SIZE values. The program that finishes last adds one to the step count."""
    step = tl.load(step_ptr)
    clip = 1.0
    proceed = True
    if HAS_NORM:
        norm = tl.load(norm_ptr)
        proceed = tl.abs(norm) < float("inf")  # false for NaN too
        if CLIP:
            clip = tl.minimum(1.0, max_norm / (norm + 1e-6))
    if LR_TENSOR:
        lr = tl.load(lr_ptr).to(tl.float32)
    if proceed:
        t = (step + 1).to(tl.float32)
        size = lr / _correction(t, ln_beta1)
        unbias = 1.0 / tl.sqrt(_correction(t, ln_beta2))
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        mask = at < numel
        block_mask = block * SIZE < numel
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * clip
        p = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if EIGHT:
            m = decode_tile(tl.load(m_ptr + at, mask=mask, other=127), True, BLOCKS)
            v = decode_tile(tl.load(v_ptr + at, mask=mask, other=0), False, BLOCKS)
            m = m * tl.load(m_absmax_ptr + block, mask=block_mask, other=0.0)[:, None]
            v = v * tl.load(v_absmax_ptr + block, mask=block_mask, other=0.0)[:, None]
        else:
            m = tl.load(m_ptr + at, mask=mask, other=0.0)
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
        m += (1.0 - beta1) * (g - m)
        v += (1.0 - beta2) * (g * g - v)
        p = p * (1.0 - lr * weight_decay) - size * m / (tl.sqrt(v) * unbias + eps)
        tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=mask)
        if COPY:
            tl.store(copy_ptr + at, p.to(copy_ptr.dtype.element_ty), mask=mask)
        if EIGHT:
            m_absmax = tl.max(tl.abs(m), axis=1)
            v_absmax = tl.max(v, axis=1)
            tl.store(m_absmax_ptr + block, m_absmax, mask=block_mask)
            tl.store(v_absmax_ptr + block, v_absmax, mask=block_mask)
            tl.store(m_ptr + at, encode(m, m_absmax, True, COMPILED), mask=mask)
            tl.store(v_ptr + at, encode(v, v_absmax, False, COMPILED), mask=mask)
        else:
            tl.store(m_ptr + at, m, mask=mask)
            tl.store(v_ptr + at, v, mask=mask)
        if tl.atomic_add(step_ptr + 1, 1) == tl.num_programs(0) - 1:
            tl.store(step_ptr, step + 1)
            tl.store(step_ptr + 1, 0)


@triton.jit
def _square_sum_kernel(x_ptr, partial_ptr, numel, BLOCK: tl.constexpr):
    """partial[program] = sum of squares of the program's share, in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, stride):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _root_kernel(partial_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(norm_ptr, tl.sqrt(tl.sum(tl.load(partial_ptr + lanes, mask=lanes < count, other=0.0), axis=0)))


@torch.library.custom_op("dropforge::gradient_norm", mutates_args=())
def _norm(grad: torch.Tensor) -> torch.Tensor:
    norm = torch.empty((), dtype=torch.float32, device=grad.device)
    programs = max(1, min(8 * processors(grad.device), triton.cdiv(grad.numel(), 2048)))
    partial = torch.empty(programs, dtype=torch.float32, device=grad.device)
    _square_sum_kernel[(programs,)](grad, partial, grad.numel(), BLOCK=2048, num_warps=8)
    _root_kernel[(1,)](partial, norm, programs, BLOCK=triton.next_power_of_2(programs), num_warps=4)
    return norm


@_norm.register_fake
def _(grad):
    return grad.new_empty((), dtype=torch.float32)


def _launch(param, grad, m, v, step, absmax, absmax_sq, lr_tensor, norm, copy, lr, beta1, beta2, eps, decay, max_norm):
    eight = absmax is not None
    blocks, warps = TILE if eight else (4, 4)
    _adamw_kernel[(max(1, triton.cdiv(param.numel(), blocks * STATE_BLOCK)),)](
        param,
        grad,
        m,
        v,
        absmax if eight else m,
        absmax_sq if eight else v,
        step,
        norm if norm is not None else step,
        lr_tensor if lr_tensor is not None else step,
        copy if copy is not None else param,
        param.numel(),
        lr,
        beta1,
        beta2,
        math.log(beta1) if beta1 > 0 else -1e4,
        math.log(beta2) if beta2 > 0 else -1e4,
        eps,
        decay,
        max_norm if max_norm is not None else 0.0,
        EIGHT=eight,
        HAS_NORM=norm is not None,
        CLIP=norm is not None and max_norm is not None,
        LR_TENSOR=lr_tensor is not None,
        COPY=copy is not None,
        COMPILED=param.is_cuda,
        BLOCKS=blocks,
        SIZE=STATE_BLOCK,
        num_warps=warps,
    )


@torch.library.custom_op("dropforge::adamw", mutates_args=("param", "m", "v", "step", "absmax", "absmax_sq", "copy"))
def _adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: torch.Tensor,
    absmax: torch.Tensor | None,
    absmax_sq: torch.Tensor | None,
    lr_tensor: torch.Tensor | None,
    norm: torch.Tensor | None,
    copy: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    max_norm: float | None,
) -> None:
    _launch(param, grad, m, v, step, absmax, absmax_sq, lr_tensor, norm, copy, lr, beta1, beta2, eps, decay, max_norm)


@_adamw.register_fake
def _(*_: object):
    return None


def adamw_state(param: torch.Tensor, *, bits: int = 32) -> AdamWState:
    """A fresh state for a flat ``param`` (n): 8 bytes a value with bits=32, 2.03 with bits=8. Raises ValueError for
    other bits.
    """
    check_tensor("adamw_state", "param", param)
    check_ndim("adamw_state", "param", param, 1)
    device, size = param.device, param.numel()
    step = torch.zeros(2, dtype=torch.int32, device=device)
    if bits == 32:
        m, v = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
        return AdamWState(m, v, step)
    if bits != 8:
        raise ValueError(f"adamw_state: bits must be 32 or 8; received {bits}")
    m = torch.full((size,), 127, dtype=torch.uint8, device=device)  # code 127 of the signed map is zero
    v = torch.zeros(size, dtype=torch.uint8, device=device)
    absmax, absmax_sq = (torch.zeros(-(-size // STATE_BLOCK), device=device) for _ in range(2))
    return AdamWState(m, v, step, absmax, absmax_sq)


def gradient_norm(grad: torch.Tensor) -> torch.Tensor:
    """The 2-norm of a contiguous tensor of any shape as an fp32 scalar on its device, summed in fp32 in a fixed order
    (two launches).

    Raises TypeError or ValueError for a wrong dtype or strides.
    """
    check_tensor("gradient_norm", "grad", grad)
    check_dtype("gradient_norm", "grad", grad)
    if not grad.is_contiguous():
        raise ValueError(f"gradient_norm: grad must be contiguous; received strides {grad.stride()}")
    if choose("gradient_norm", grad).backend is Backend.REFERENCE:
        return reference.gradient_norm(grad)
    return _norm(grad.detach())


@torch.no_grad()
def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: AdamWState,
    *,
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_norm: torch.Tensor | None = None,
    max_norm: float | None = None,
    low_precision: torch.Tensor | None = None,
) -> None:
    """One AdamW step in place on ``param`` and ``state``; formula at the top of this file.

    param, grad: (n) contiguous, each bf16, fp16 or fp32 (a bf16 param is rounded to nearest each step: keep fp32
    masters for small updates). state: from ``adamw_state(param)``. lr: a number, or a one-element tensor on the
    device (so that a captured graph follows a schedule). grad_norm: the gradient's norm (``gradient_norm``, or
    reduced over ranks): clips to max_norm if that is given, and a value that is not finite skips the step.
    low_precision: (n) receives the updated parameters in its own dtype in the same pass. No host wait: step count,
    rate and norm are read on the device, so one captured graph serves a whole schedule. Raises TypeError and
    ValueError for wrong dtypes, shapes, devices and options."""
    _check(param, grad, state, betas, eps, grad_norm, max_norm, low_precision)
    _check_device_scalars(param, state.step, lr)
    options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "grad_norm": grad_norm, "max_norm": max_norm}
    if choose(OP, param, grad, state.exp_avg).backend is Backend.REFERENCE:
        reference.adamw(param, grad, state, lr=lr, low_precision=low_precision, **options)
        return
    rate = lr if isinstance(lr, torch.Tensor) else None
    tensors = (state.exp_avg, state.exp_avg_sq, state.step, state.absmax, state.absmax_sq)
    # The dispatcher's Python layers cost the host more than the launch; only torch.compile needs them.
    run = _adamw if torch.compiler.is_compiling() else _launch
    number = 0.0 if rate is not None else float(lr)
    run(param, grad, *tensors, rate, grad_norm, low_precision, number, *betas, eps, weight_decay, max_norm)


def _check(param, grad, state, betas, eps, grad_norm, max_norm, low_precision):
    check_tensor(OP, "param", param)
    check_dtype(OP, "param", param)
    check_ndim(OP, "param", param, 1)
    check_dtype(OP, "grad", grad)
    check_same_shape(OP, "grad", grad, "param", param)
    check_same_shape(OP, "state.exp_avg", state.exp_avg, "param", param)
    check_same_device(
        OP, param=param, grad=grad, exp_avg=state.exp_avg, grad_norm=grad_norm, low_precision=low_precision
    )
    for name, tensor in (("param", param), ("grad", grad), ("low_precision", low_precision)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{OP}: {name} must be contiguous; received strides {tensor.stride()}")
    if low_precision is not None:
        check_dtype(OP, "low_precision", low_precision, FLOATS)
        check_same_shape(OP, "low_precision", low_precision, "param", param)
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"{OP}: betas must be in [0, 1); received {betas}")
    if not eps > 0:
        raise ValueError(f"{OP}: eps must be positive; received {eps}")
    if grad_norm is not None and (grad_norm.numel() != 1 or grad_norm.dtype is not torch.float32):
        raise ValueError(
            f"{OP}: grad_norm must be one fp32 value; received {tuple(grad_norm.shape)} of {grad_norm.dtype}"
        )
    if max_norm is not None:
        if grad_norm is None:
            raise ValueError(f"{OP}: max_norm needs grad_norm (see gradient_norm); received None")
        if not max_norm > 0:
            raise ValueError(f"{OP}: max_norm must be positive; received {max_norm}")


def _check_device_scalars(param, step, lr):
    """A pointer to another device's memory would be read as it is: refuse it here."""
    if step.dtype is not torch.int32 or tuple(step.shape) != (2,):
        raise ValueError(f"{OP}: state.step must be int32 of shape (2,); received {step.dtype} {tuple(step.shape)}")
    check_same_device(OP, **{"param": param, "state.step": step})
    if isinstance(lr, torch.Tensor):
        check_dtype(OP, "lr", lr)
        check_same_device(OP, param=param, lr=lr)
        if lr.numel() != 1:
            raise ValueError(f"{OP}: lr must be a number or one value; received shape {tuple(lr.shape)}")
