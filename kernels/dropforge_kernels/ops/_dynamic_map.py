"""The dynamic 8-bit map of optimizer states in Triton: encode and decode by arithmetic.

The map (reference/adamw.py, ``dynamic_map``) is seven decades of equal cells, so that an entry is computed, neither
searched nor looked up.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_10 = tl.constexpr(3.321928094887362)
SMALLEST_ABSMAX = tl.constexpr(1e-37)  # below, a reciprocal would overflow
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _cell(relative, SIGNED: tl.constexpr):
    """Index of the dynamic map's nearest value for 0 <= relative <= 1, counted from its zero.

    Decade i = 0..6 ends at 10^(i - 6) and has n = n0 2^i cells; its codes start at index n - n0 + 1. The border
    between decades is half way between the middles of the cells beside it: 0.9 / n above the lower one's end.
    Selecting among constants is cheaper here than a logarithm and conversions, which queue for the special-function
    units."""
    n0: tl.constexpr = 1 if SIGNED else 2
    n = tl.full(relative.shape, n0, tl.float32)
    factor = tl.full(relative.shape, n0 * 1e6 / 0.9, tl.float32)  # cells per unit
    for i in tl.static_range(1, 7):
        above = relative >= (10.0 ** (i - 7)) * (1.0 + 0.9 / (n0 * 2.0 ** (i - 1)))
        n = tl.where(above, n0 * 2.0**i, n)
        factor = tl.where(above, n0 * 2.0**i * 10.0 ** (6 - i) / 0.9, factor)
    cell = relative * factor - n * 0.11111111
    # Adding ROUNDER rounds to the nearest integer and leaves it in the low bits; round(x - 0.5) is floor(x).
    floored = tl.minimum(tl.maximum(cell - 0.5, -0.25), n - 1.0) + n + ROUNDER
    index = floored.to(tl.int32, bitcast=True) - (ROUNDER_BITS + n0 - 1)
    index = tl.where(relative < 0.5e-6 * (0.1 + 0.45 / n0), 0, index)
    return tl.where(relative >= 1.0 - 0.225 / (n0 * 64.0), 64 * n0 * 2 - n0 + 1, index)


@triton.jit
def encode(value, absmax, SIGNED: tl.constexpr):
    """uint8 codes of [B, 256] values with absmax [B]."""
    relative = value * (1.0 / tl.maximum(absmax, SMALLEST_ABSMAX))[:, None]
    if SIGNED:
        size = _cell(tl.abs(relative), True)
        code = 127 + tl.where(relative < 0.0, -tl.minimum(size, 127), size)
    else:
        code = tl.maximum(_cell(relative, False), (relative > 0.0).to(tl.int32))
    return code.to(tl.uint8)


@triton.jit
def decode(code, SIGNED: tl.constexpr):
    """The dynamic map's value of uint8 codes: computed, because 256-entry lookups cost the memory pipeline more than
    the arithmetic.

    With q = code from zero + n0 - 1 in [n, 2n), n a power of two: decade = log2(n / n0), and (q + 0.5) / n is the
    mantissa of q + 0.5."""
    n0: tl.constexpr = 1 if SIGNED else 2
    index = code.to(tl.int32)
    if SIGNED:
        index -= 127
    size = tl.abs(index)
    # an integer below 2^23 put under the exponent of 2^23 is that float plus 2^23: a conversion without a conversion
    # instruction
    q = ((size + (n0 - 1)) | 0x4B000000).to(tl.float32, bitcast=True) - 8388607.5
    bits = q.to(tl.int32, bitcast=True)
    decade = (((bits >> 23) - (127 + n0 - 1 - 1)) | 0x4B000000).to(tl.float32, bitcast=True) - 8388609.0
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    value = tl.exp2(decade * LOG2_10 - 6.0 * LOG2_10) * (0.9 * mantissa - 0.8)
    value = tl.where(size == 0, 0.0, tl.where(size == 128 * n0 - n0 + 1, 1.0, value))
    return tl.where(index < 0, -value, value)
