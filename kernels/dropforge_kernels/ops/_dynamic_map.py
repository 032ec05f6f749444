"""The dynamic 8-bit map of optimizer states in Triton: encode and decode by arithmetic.

The map (reference/adamw.py, ``dynamic_map``) is seven decades of equal cells, so that an entry is computed, neither
searched nor looked up.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_10 = tl.constexpr(3.321928094887362)
LOG10_2 = tl.constexpr(0.3010299956639812)
SMALLEST_ABSMAX = tl.constexpr(1e-37)  # below, a reciprocal would overflow
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23
TWO_23 = tl.constexpr(8388608.0)
SIGN_BIT = tl.constexpr(-(2**31))


@triton.jit
def _log2(x, COMPILED: tl.constexpr):
    """One instruction, where tl.log2 is a polynomial. COMPILED: not in the interpreter."""
    if COMPILED:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _exp2(x, COMPILED: tl.constexpr):
    """One instruction, where tl.exp2 is four: it keeps results below 2^-126, of which there are none here."""
    if COMPILED:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def _cell(relative, SIGNED: tl.constexpr, COMPILED: tl.constexpr):
    """Index of the dynamic map's nearest value for 0 <= relative <= 1, counted from its zero; fp32.

    Decade k = 0..6, counted from the top, ends at 10^-k and has n = n0 2^(6 - k) cells of width 0.9 10^-k / n; its
    codes start at index n - n0 + 1. The border between decades is half way between the middles of the cells beside
    it: 0.2 cells above the lower one's end. A logarithm finds the decade; should its rounding name a neighbour, the
    bounds of the cell's number mend that."""
    n0: tl.constexpr = 1 if SIGNED else 2
    log = _log2(tl.maximum(relative, 1.05e-7), COMPILED)
    decade = (log * -LOG10_2 - 0.5) + ROUNDER  # rounds to the nearest integer
    # The integer is in the low bits; put under the exponent it makes a power of two.
    n = (((127 + 6 + n0 - 1) << 23) - (decade.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    scaled = relative * _exp2((decade - ROUNDER) * LOG2_10, COMPILED)
    cell = (scaled * 1.1111111 - 0.11111111) * n
    # round(x - 0.5) is floor(x); below 0.2 the second term gives -1, the lower decade's last cell
    floored = tl.minimum(tl.minimum(cell - 0.5, 4.0 * cell - 1.3), n - 1.0) + (n + ROUNDER)
    index = floored - (ROUNDER + (n0 - 1))
    if SIGNED:  # half way between zero and the first value; without sign it never matters
        index = tl.where(relative < 2.75e-7, 0.0, tl.maximum(index, 1.0))
    return tl.where(relative >= 1.0 - 0.225 / (n0 * 64.0), 64.0 * n0 * 2 - n0 + 1, index)


@triton.jit
def encode(value, absmax, SIGNED: tl.constexpr, COMPILED: tl.constexpr):
    """uint8 codes of [B, 256] values with absmax [B]; COMPILED: not in the interpreter."""
    relative = value * (1.0 / tl.maximum(absmax, SMALLEST_ABSMAX))[:, None]
    if SIGNED:
        # The size under the value's sign bit. Zero's code is 127, and there is one size more above it than below.
        size = _cell(tl.abs(relative), True, COMPILED).to(tl.int32, bitcast=True)
        signed = (size | (relative.to(tl.int32, bitcast=True) & SIGN_BIT)).to(tl.float32, bitcast=True)
        code = tl.maximum(signed, -127.0) + (127.0 + TWO_23)
    else:
        code = tl.maximum(_cell(relative, False, COMPILED), tl.where(relative > 0.0, 1.0, 0.0)) + TWO_23
    # An integer plus 2^23 has its low bits in the float's: a conversion without a conversion instruction.
    return code.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def decode_tile(codes, SIGNED: tl.constexpr, ROWS: tl.constexpr):
    """The values of [ROWS, 256] codes, looked up in shared memory among all 256: three instructions a value, where
    ``decode`` takes twenty.
    """
    table = decode(tl.arange(0, 256).to(tl.uint8), SIGNED)
    return tl.reshape(tl.gather(table, tl.reshape(codes, [ROWS * 256]).to(tl.int32), 0), [ROWS, 256])


@triton.jit
def decode(code, SIGNED: tl.constexpr):
    """The dynamic map's value of uint8 codes, computed.

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
