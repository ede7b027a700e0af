"""The layer without an input scale at 2 bits and one scale per channel, in integers: csrc/cpu/weight_digits.hpp's bits.

    T(code * T(s)) = code * T(s)             for the codes -2, -1, 0, 1: the scale comes out of the sum
    i[k] = rne(x[k] * 2^(22-e))              max |x| < 2^e of the row, so |i| <= 2^22
    i    = 65536 d2 + 256 d1 + d0            three signed bytes
    sum_k x[k] * code[k] * T(s) = T(s) * 2^(e-22) * (65536 acc2 + 256 acc1 + acc0)

The digits are three rows of an integer dot on int8 tensor cores: a row of activations costs what four cost the integer
layer. The product is exact in float64 and rounded once, to float32; so no order of summation is left, and CPU and
GPU agree to the bit. A row with a NaN or an infinity has no digits: what it makes of the sums does not hang on their
order, and sums of floats take over for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bytelane.kernels.triton_codes import (
    INTERPRETED,
    ROUND,
    emulated_output,
    load_bytes,
    load_floats,
    plane_of_bytes,
    rounded_to,
    split_planes,
)

DIGITS = tl.constexpr(4)
"""Rows of digits for a row of activations: three, and one of zeros, because tiles are powers of two."""


@triton.jit
def _power_of_two(exponent):
    """`2^exponent` as float32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _digits(floats, exponent, digit):
    """Digit `digit` (a column `[R, 1]` of 0..3) of `rne(floats * 2^(22 - exponent))`, int8; digit 3 is 0."""
    half = (22 - exponent) // 2
    scaled = floats.to(tl.float32) * _power_of_two(half) * _power_of_two(22 - exponent - half)
    fixed = (scaled + ROUND).to(tl.int32, bitcast=True) - 0x4B400000
    low = (fixed << 24) >> 24
    rest = (fixed - low) >> 8
    middle = (rest << 24) >> 24
    high = (rest - middle) >> 8
    upper = tl.where(digit == 2, high, 0)
    return tl.where(digit == 0, low, tl.where(digit == 1, middle, upper)).to(tl.int8)


@triton.jit(do_not_specialize=["rows"])
def digits_linear(
    x,
    weight,
    weight_scale,
    output_scale,
    bias,
    y,
    rows,
    out_features,
    in_features,
    row_bytes,
    OUTPUT: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
):
    """`x` `[M, K]` 16-bit floats to `y` `[M, N]`; a program takes BN channels and BM rows, BB bytes at a time.

    Programs of the same channels come one after another, so that they share the weight in the second-level cache.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    in_channels = channels < out_features
    column = channels[:, None]
    in_column = in_channels[:, None]
    first_row = tl.program_id(0) * BM
    r = tl.arange(0, BM * DIGITS)
    m = first_row + r // DIGITS
    digit = (r % DIGITS)[:, None]
    x_at = x + m[:, None].to(tl.int64) * in_features
    x_mask = (m < rows)[:, None]
    largest = tl.zeros((BM * DIGITS,), tl.int32)
    for start in range(0, in_features, BK):
        k = (start + tl.arange(0, BK))[None, :]
        floats = tl.load(x_at + k, mask=x_mask & (k < in_features), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(floats.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    finite = largest < 0x7F800000
    exponent = tl.where(finite, tl.maximum((largest >> 23) - 126, -126), 0)
    at = weight + column.to(tl.int64) * row_bytes
    acc = tl.zeros((BN, BM * DIGITS), tl.int32)
    for start in range(0, row_bytes, BB):
        floats = load_floats(x_at, x_mask, start, row_bytes, in_features, BB, 4)
        parts = split_planes(_digits(floats, exponent[:, None], digit), BM * DIGITS, BB, 4)
        packed = load_bytes(at, (start + tl.arange(0, BB))[None, :], in_column, row_bytes, 2, EVEN)
        for p in tl.static_range(4):
            acc = tl.dot(plane_of_bytes(packed, p, 2, 6), tl.trans(parts[p]), acc, out_dtype=tl.int32)
    weights = tl.where(digit == 0, 1.0, tl.where(digit == 1, 256.0, 65536.0)).to(tl.float64)
    wide = (acc >> 6).to(tl.float64) * tl.trans(weights)
    total = tl.sum(tl.reshape(wide, (BN, BM, DIGITS)), 2)
    scale = rounded_to(tl.load(weight_scale + column, mask=in_column, other=0.0), dtype).to(tl.float32)
    of_row = tl.max(tl.reshape(exponent, (BM, DIGITS)), 1)
    half = (of_row - 22) // 2
    unit = _power_of_two(half).to(tl.float64) * _power_of_two(of_row - 22 - half).to(tl.float64)
    sums = (total * scale.to(tl.float64) * unit[None, :]).to(tl.float32)
    out_m = first_row + tl.arange(0, BM)
    if tl.min(finite.to(tl.int32), 0) == 0:
        plain_at = x + out_m[:, None].to(tl.int64) * in_features
        floats_acc = tl.zeros((BN, BM), tl.float32)
        for start in range(0, row_bytes, BB):
            floats = load_floats(plain_at, (out_m < rows)[:, None], start, row_bytes, in_features, BB, 4)
            parts = split_planes(floats, BM, BB, 4)
            packed = load_bytes(at, (start + tl.arange(0, BB))[None, :], in_column, row_bytes, 2, EVEN)
            for p in tl.static_range(4):
                left = plane_of_bytes(packed, p, 2, 0).to(tl.float32)
                if INTERPRETED:
                    floats_acc = tl.dot(left, tl.trans(parts[p]).to(tl.float32), floats_acc)
                else:
                    floats_acc = tl.dot(left.to(dtype), tl.trans(parts[p]), floats_acc)
        row_finite = tl.min(tl.reshape(finite.to(tl.int32), (BM, DIGITS)), 1) == 1
        sums = tl.where(row_finite[None, :], sums, floats_acc * scale)
    if BIAS:
        sums += rounded_to(tl.load(bias + column, mask=in_column, other=0.0), dtype).to(tl.float32)
    value = rounded_to(sums, dtype)
    if OUTPUT:
        value = emulated_output(value, output_scale)
    to = y + out_m[None, :].to(tl.int64) * out_features + column
    tl.store(to, value, mask=in_column & (out_m < rows)[None, :])
