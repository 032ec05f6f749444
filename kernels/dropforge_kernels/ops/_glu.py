"""The kernels behind the gated activations: h = activation(gate) * up, elementwise, one launch each way.

Legend: R rows, I row width. A program takes BLOCK elements of one row; contiguous tensors are walked as a single row.
INTERLEAVED: gate and up alternate in memory (gpt-oss); both are then read and written as one run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dropforge_kernels.ops._common import as_rows

SILU, GELU_EXACT, GELU_TANH, CLAMPED = range(4)
_GELU_EXACT: tl.constexpr = tl.constexpr(GELU_EXACT)
_GELU_TANH: tl.constexpr = tl.constexpr(GELU_TANH)
_CLAMPED: tl.constexpr = tl.constexpr(CLAMPED)


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr, alpha):
    """(a(g), a'(g)) in fp32.

    SILU: g * sigmoid(g). CLAMPED: g * sigmoid(alpha g). GELU_EXACT: g * (1 + erf(g / sqrt 2)) / 2.
    GELU_TANH: g * (1 + tanh(t)) / 2 with t = sqrt(2 / pi) * (g + 0.044715 g^3), and (1 + tanh(t)) / 2 = sigmoid(2 t).
    """
    if ACTIVATION == _GELU_EXACT:
        gate = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = gate + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == _GELU_TANH:
        gate = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        slope = gate + g * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    elif ACTIVATION == _CLAMPED:
        gate = tl.sigmoid(alpha * g)
        slope = gate * (1 + alpha * g * (1 - gate))
    else:
        gate = tl.sigmoid(g)
        slope = gate * (1 + g * (1 - gate))
    return g * gate, slope


@triton.jit(do_not_specialize=["blocks"])
def glu_forward_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, blocks, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = a(gate) * up; CLAMPED: h = a(min(gate, limit)) * (clamp(up, -limit, limit) + 1)."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    col = start + tl.arange(0, BLOCK)
    if INTERLEAVED:
        both = 2 * start + tl.arange(0, 2 * BLOCK)
        pairs = tl.load(gate_ptr + row * gate_stride + both, mask=both < 2 * width, other=0.0).to(tl.float32)
        g, u = tl.split(tl.reshape(pairs, [BLOCK, 2]))
    else:
        g = tl.load(gate_ptr + row * gate_stride + col, mask=col < width, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + row * up_stride + col, mask=col < width, other=0.0).to(tl.float32)
    if ACTIVATION == _CLAMPED:
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit) + 1
    a, _ = _activation(g, ACTIVATION, alpha)
    tl.store(out_ptr + row * width + col, (a * u).to(out_ptr.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["blocks"])
def glu_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, product_ptr,
    dh_stride, gate_stride, up_stride, dgate_stride, dup_stride, width, blocks, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate = dh * up * a'(gate), dup = dh * a(gate); where a clamp was active its gradient is zero.

    Every element is read before it is written by the same program, so outputs may be the inputs. PRODUCT also writes
    h.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    col = start + tl.arange(0, BLOCK)
    dh = tl.load(dh_ptr + row * dh_stride + col, mask=col < width, other=0.0).to(tl.float32)
    if INTERLEAVED:
        both = 2 * start + tl.arange(0, 2 * BLOCK)
        pairs = tl.load(gate_ptr + row * gate_stride + both, mask=both < 2 * width, other=0.0).to(tl.float32)
        g, u = tl.split(tl.reshape(pairs, [BLOCK, 2]))
    else:
        g = tl.load(gate_ptr + row * gate_stride + col, mask=col < width, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + row * up_stride + col, mask=col < width, other=0.0).to(tl.float32)
    if ACTIVATION == _CLAMPED:
        gate_free = g <= limit
        up_free = (u >= -limit) & (u <= limit)
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit) + 1
    a, slope = _activation(g, ACTIVATION, alpha)
    dg = dh * u * slope
    du = dh * a
    if ACTIVATION == _CLAMPED:
        dg = tl.where(gate_free, dg, 0.0)
        du = tl.where(up_free, du, 0.0)
    dtype = dgate_ptr.dtype.element_ty
    if INTERLEAVED:
        pairs = tl.reshape(tl.join(dg, du), [2 * BLOCK])
        tl.store(dgate_ptr + row * dgate_stride + both, pairs.to(dtype), mask=both < 2 * width)
    else:
        tl.store(dgate_ptr + row * dgate_stride + col, dg.to(dtype), mask=col < width)
        tl.store(dup_ptr + row * dup_stride + col, du.to(dtype), mask=col < width)
    if PRODUCT:
        tl.store(product_ptr + row * width + col, (a * u).to(product_ptr.dtype.element_ty), mask=col < width)


def _cut(activation: int, interleaved: bool) -> tuple[int, int]:
    """(BLOCK, warps). Measured on an H200: 8 elements a thread everywhere, but 16 for the long erf, and single warps
    for interleaved tensors, whose pairs change threads.
    """
    if interleaved:
        return 512, 1
    return 1024, 2 if activation == GELU_EXACT else 4


def _grid(contiguous: bool, numel: int, width: int, block: int) -> tuple[int, int, int]:
    """(programs, row width, blocks per row) for ``numel`` outputs; contiguous tensors are one long row."""
    if contiguous:
        blocks = -(-numel // block)
        return blocks, numel, blocks
    blocks = -(-width // block)
    return numel // width * blocks, width, blocks


def launch_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: int,
    *,
    alpha: float = 0.0,
    limit: float = 0.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """h like gate (interleaved: ``gate`` and ``up`` are the same (..., 2 I) tensor), contiguous."""
    gate, gate_stride = as_rows(gate)
    up, up_stride = as_rows(up)
    shape = (*gate.shape[:-1], gate.shape[-1] // 2) if interleaved else gate.shape
    out = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        flat = gate.is_contiguous() and up.is_contiguous()
        block, warps = _cut(activation, interleaved)
        programs, width, blocks = _grid(flat, out.numel(), shape[-1], block)
        glu_forward_kernel[(programs,)](
            gate, up, out, gate_stride, up_stride, width, blocks, alpha, limit,
            activation, interleaved, block, num_warps=warps,
        )  # fmt: skip
    return out


def launch_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    activation: int,
    *,
    alpha: float = 0.0,
    limit: float = 0.0,
    interleaved: bool = False,
    product: torch.Tensor | None = None,
) -> None:
    """Writes dgate and dup, which may be gate and up, and h into ``product`` (contiguous, may be a contiguous dh)."""
    dh, dh_stride = as_rows(dh)
    gate, gate_stride = as_rows(gate)
    up, up_stride = as_rows(up)
    if not dh.numel():
        return
    dgate_stride, dup_stride = (as_rows(t)[1] for t in (dgate, dup))
    flat = all(t.is_contiguous() for t in (dh, gate, up, dgate, dup))
    block, warps = _cut(activation, interleaved)
    programs, width, blocks = _grid(flat, dh.numel(), dh.shape[-1], block)
    glu_backward_kernel[(programs,)](
        dh, gate, up, dgate, dup, product, dh_stride, gate_stride, up_stride, dgate_stride, dup_stride,
        width, blocks, alpha, limit, activation, interleaved, product is not None, block, num_warps=warps,
    )  # fmt: skip
