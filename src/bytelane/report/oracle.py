"""A small second statement of the arithmetic in NumPy, for `bytelane verify`: it imports nothing of the package.

The formulas are those of `bytelane.numerics` (its docstring says where they come from), written again with int64
accumulators, float32 arrays and roundings of their own, so that a kernel that agrees with this file agrees with a
program that shares no line with it. Values of 16-bit dtypes are carried in float32 arrays; `rounded` rounds to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
F32 = np.float32


def rounded(values: NDArray[Any], dtype: str) -> Floats:
    """Values rounded once to `float32`, `bfloat16` or `float16`, half to even, as float32."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float16).astype(F32)
    if dtype == "float32":
        return np.asarray(values, F32)
    wide = np.asarray(values, np.float64)
    # A bfloat16 has 8 significant bits: below 2^-126 its step is 2^-133, above it 2^(exponent - 8).
    _, exponent = np.frexp(np.where(np.isfinite(wide), wide, 0))
    step = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    with np.errstate(invalid="ignore"):
        nearest = np.rint(wide / step) * step
    limit = np.ldexp(255.0 / 128, 127)
    return np.where(np.abs(nearest) > limit, np.copysign(np.inf, wide), nearest).astype(F32)


def _codes(t: Floats) -> NDArray[np.int64]:
    """Round half to even, saturate; NaN is 127."""
    clean = np.where(np.isnan(t), F32(127), t)
    return np.clip(np.rint(clean), F32(-128), F32(127)).astype(np.int64)


def quantize(x: Floats, scale: np.float32) -> NDArray[np.int64]:
    """Activations to codes: one reciprocal, one product, one rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return _codes(x.astype(F32) * (F32(1) / scale))


def accumulate(q: NDArray[Any], w: NDArray[Any], group_size: int = 0) -> NDArray[np.int64]:
    """Codes `[M, K]` and `[N, K]` to exact sums `[M, N, G]`, a group at a time."""
    left, right = q.astype(np.int64), w.astype(np.int64)
    step = group_size or max(left.shape[1], 1)
    parts = [left[:, k : k + step] @ right[:, k : k + step].T for k in range(0, max(left.shape[1], 1), step)]
    return np.stack(parts, -1)


def requantize(
    acc: NDArray[np.int64],
    weight_scale: Floats,
    input_scale: np.float32,
    output_scale: Floats | None,
    bias: Floats | None,
) -> Floats:
    """Sums `[M, N, G]` to outputs `[M, N]`; `output_scale` has one element or N."""
    ratio = input_scale * weight_scale
    unit = ratio[:, 0]
    s_out = None if output_scale is None else np.broadcast_to(output_scale, (weight_scale.shape[0],))
    if s_out is not None:
        ratio = ratio / s_out[:, None]
    grouped = acc.shape[2] > 1
    if bias is not None and s_out is not None and not grouped:
        acc = acc + np.rint(bias / unit).astype(np.int64)[None, :, None]
    total = acc[:, :, 0].astype(F32) * ratio[:, 0]
    for g in range(1, acc.shape[2]):
        total = total + acc[:, :, g].astype(F32) * ratio[:, g]
    if s_out is None:
        return total if bias is None else total + bias
    if bias is not None and grouped:
        total = total + bias / s_out
    return _codes(total).astype(F32) * s_out


def linear(
    x: Floats,
    codes: NDArray[Any],
    weight_scale: Floats,
    input_scale: np.float32,
    output_scale: Floats | None = None,
    bias: Floats | None = None,
    group_size: int = 0,
) -> Floats:
    """The `integer` layer: `[M, K]` to `[M, N]` in float32, before the cast to the activation dtype."""
    acc = accumulate(quantize(x, input_scale), codes, group_size)
    return requantize(acc, weight_scale, input_scale, output_scale, bias)


def fake_quantize(x: Floats, scale: np.float32, dtype: str) -> Floats:
    """`emulated`'s clamp: every operation rounded to the dtype, the scale first."""
    s = rounded(np.asarray(scale), dtype)
    # A quotient of two float32 in float64, rounded to 24 bits or fewer, is the correctly rounded quotient.
    steps = np.clip(np.rint(rounded(x.astype(np.float64) / s.astype(np.float64), dtype)), F32(-128), F32(127))
    return rounded(steps * s, dtype)


def dequantize(codes: NDArray[Any], weight_scale: Floats, dtype: str) -> Floats:
    """Codes `[N, K]` times scales `[N, G]`, both first rounded to the dtype."""
    groups = weight_scale.shape[1]
    grouped = codes.astype(F32).reshape(codes.shape[0], groups, -1)
    scaled = rounded(grouped * rounded(weight_scale, dtype)[:, :, None], dtype)
    return scaled.reshape(codes.shape)


def embedding(ids: NDArray[Any], codes: NDArray[Any], weight_scale: Floats, factor: float, dtype: str) -> Floats:
    """Rows of a table in the dtype, times the architecture's factor."""
    flat = ids.reshape(-1)
    rows = rounded(dequantize(codes[flat], weight_scale[flat], dtype) * F32(factor), dtype)
    return rows.reshape(*ids.shape, codes.shape[1])


def float_linear(x: Floats, values: Floats, bias: Floats | None, dtype: str) -> tuple[Floats, NDArray[np.float64]]:
    """`x @ values.T + bias` rounded once, and how far a sum of float32 products in any order may be from it.

    A term passes through at most K + 1 roundings of relative size u = 2^-24, so the sum moves by at most
    (K + 1) u / (1 - (K + 1) u) times the sum of the terms' sizes. A kernel may round its inputs to fixed point of 22
    bits below the row's largest: K times 2^-22 of the largest x times the largest value more. Rounding to the dtype
    adds half of its last place.
    """
    wide, weights = x.astype(np.float64), values.astype(np.float64)
    offset = 0.0 if bias is None else rounded(bias, dtype).astype(np.float64)
    total = wide @ weights.T + offset
    sizes = np.abs(wide) @ np.abs(weights).T + np.abs(offset)
    share = (x.shape[1] + 1) * 2.0**-24
    fixed = 2.0**-22 * np.abs(wide).max(1, initial=0.0)[:, None] * np.abs(weights).sum(1)
    before = share / (1 - share) * sizes + fixed
    place = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    return rounded(total, dtype), before + 2 * place * (np.abs(total) + before) + 2.0**-24
