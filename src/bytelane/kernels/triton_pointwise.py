"""Requantization, embedding lookup and norms in Triton: one pass over what they read, the bits of the CPU."""

from __future__ import annotations

import triton
import triton.language as tl

from bytelane.kernels.triton_codes import (
    channel_terms,
    finish,
    group_ratio,
    load_channels,
    load_output_scale,
    rounded_to,
)


@triton.jit
def requantize_rows(
    acc,
    weight_scale,
    input_scale,
    output_scale,
    bias,
    y,
    out_features,
    groups,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    BN: tl.constexpr,
):
    """Accumulators `[M, N, groups]` to `y` `[M, N]`; a program takes BN channels of a row."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = channels < out_features
    s_in = tl.load(input_scale)
    s_out = load_output_scale(output_scale, channels, inside, OUTPUTS)
    scale, late = load_channels(weight_scale, bias, channels, inside, BIAS, GROUPED)
    ratio, early, late = channel_terms(scale, late, s_in, s_out, OUTPUTS, BIAS, GROUPED)
    at = acc + (row * out_features + channels) * groups
    if GROUPED:
        total = tl.full((BN,), -0.0, tl.float32)
        for g in range(0, groups):
            ratio = group_ratio(weight_scale, s_in, s_out, channels, inside, g, groups, OUTPUTS)
            total = total + tl.load(at + g, mask=inside, other=0).to(tl.float32) * ratio
    else:
        total = (tl.load(at, mask=inside, other=0) + early).to(tl.float32) * ratio
    total = finish(total, s_out, late, OUTPUTS, BIAS and (GROUPED or OUTPUTS == 0))
    tl.store(y + row * out_features + channels, rounded_to(total, y.dtype.element_ty), mask=inside)


@triton.jit
def gather_rows(
    ids,
    weight,
    weight_scale,
    y,
    table_rows,
    row_stride,
    scale_stride,
    row_bytes,
    embedding_dim,
    group_size,
    embed_scale,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows `ids` of a packed table, dequantized, to `y` `[ids, dim]`; a program takes BLOCK codes of a row.

    `f32(code) * s_w` and the product with `embed_scale` are each rounded to the dtype of `y`. An id that is no row
    gives NaN: a kernel cannot raise, and must not read past the table.
    """
    position = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < embedding_dim
    row = tl.load(ids + position).to(tl.int64) + tl.zeros((BLOCK,), tl.int64)
    known = (row >= 0) & (row < table_rows)
    at = (k * BITS) // 8
    reads = inside & known
    bits = tl.load(weight + row * row_stride + at, mask=reads, other=0).to(tl.int32)
    if 8 % BITS != 0:
        bits |= (
            tl.load(weight + row * row_stride + at + 1, mask=reads & (at + 1 < row_bytes), other=0).to(tl.int32) << 8
        )
    codes = ((bits >> ((k * BITS) % 8)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    scale = tl.load(weight_scale + row * scale_stride + k // group_size, mask=reads, other=float("nan"))
    dtype: tl.constexpr = y.dtype.element_ty
    value = rounded_to(codes.to(tl.float32) * rounded_to(scale, dtype).to(tl.float32), dtype)
    value = value.to(tl.float32) * embed_scale
    tl.store(y + position * embedding_dim + k, rounded_to(value, dtype), mask=inside)


@triton.jit
def norm_rows(
    x,
    weight,
    y,
    width,
    eps,
    WEIGHT: tl.constexpr,
    IN_T: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`T(x * r * w)` of rows `[M, width]`, or `T(w * T(x * r))` (IN_T), `r = 1 / sqrt(f32(mean of x^2) + eps)`.

    The mean is in float64, where sums of squares of 16-bit floats are exact unless they lie 2^26 apart; so the order of
    the sum is free, and the bits are the CPU's (csrc/cpu/float_ops.hpp). PLUS_ONE: the weight is stored less 1.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < width
    values = tl.load(x + row * width + k, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT:
        w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    wide = values.to(tl.float64)
    mean = (tl.sum(wide * wide, 0) / width).to(tl.float32)
    root = tl.math.sqrt_rn(mean + eps)
    normal = values * tl.math.div_rn(1.0, root)
    dtype: tl.constexpr = y.dtype.element_ty
    if WEIGHT:
        if IN_T:
            normal = rounded_to(normal, dtype).to(tl.float32)
        if PLUS_ONE:
            w = 1.0 + w
        normal = normal * w
    tl.store(y + row * width + k, rounded_to(normal, dtype), mask=inside)
