"""The layer without an input scale: 16-bit activations, N-bit weights, float32 sums, in Triton.

    y[m,n] = T(sum_k x[m,k] * T(w[n,k] * T(s_w[n,g])) + bias[n])        T: the dtype of x, sums in float32

followed by the output step of `emulated`, in T. Sums of floats depend on their order; it is fixed by the tile, so a
configuration gives the same bits every time. At 2 bits with one scale per channel triton_digits.py does better.

Planes, and why no code moves: triton_codes.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bytelane.kernels.triton_codes import (
    INTERPRETED,
    emulated_output,
    load_bytes,
    load_floats,
    load_plane,
    rounded_to,
    split_planes,
)


@triton.jit(do_not_specialize=["rows"])
def weight_only_linear(
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
    groups,
    group_blocks,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    OUTPUT: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
):
    """`x` `[M, K]` to `y` `[M, N]` in the dtype of `x`; a program takes BN channels and BM rows."""
    dtype: tl.constexpr = x.dtype.element_ty
    channels = tl.program_id(0) * BN + tl.arange(0, BN)
    in_channels = channels < out_features
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    in_m = m < rows
    column = channels[:, None]
    in_column = in_channels[:, None]
    at = weight + column.to(tl.int64) * row_bytes
    row_blocks = group_blocks * groups
    x_rows = x + m[:, None].to(tl.int64) * in_features
    acc = tl.zeros((BN, BM), tl.float32)
    for g in range(0, groups):
        scale = tl.load(weight_scale + column * groups + g, mask=in_column, other=0.0)
        scale = rounded_to(scale, dtype).to(tl.float32)
        end = (g + 1) * group_blocks
        for first in range(g * group_blocks, end, BB):
            floats = load_floats(x_rows, in_m[:, None], first, end, in_features, BB, PLANES)
            parts = split_planes(floats, BM, BB, PLANES)
            blocks = (first + tl.arange(0, BB))[None, :]
            packed = load_bytes(at, blocks, in_column, row_blocks, BITS, EVEN)
            for p in tl.static_range(PLANES):
                codes = load_plane(packed, at, blocks, in_column & (blocks < row_blocks), row_bytes, p, BITS, 0)
                left = rounded_to(codes.to(tl.float32) * scale, dtype)
                right = tl.trans(parts[p])
                if INTERPRETED:  # its dot takes bfloat16 for the integers that hold it
                    acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
                else:
                    acc = tl.dot(left, right, acc)
    if BIAS:
        acc += rounded_to(tl.load(bias + column, mask=in_column, other=0.0), dtype).to(tl.float32)
    value = rounded_to(acc, dtype)
    if OUTPUT:
        value = emulated_output(value, output_scale)
    tl.store(y + m[None, :].to(tl.int64) * out_features + column, value, mask=in_column & in_m[None, :])
