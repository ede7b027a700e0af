"""The operations between the layers a second time, in NumPy, for `bytelane verify`: it imports no kernel.

Written from the formulas at the head of csrc/cpu/float_ops.hpp, float_dot.hpp and attention.hpp. NumPy rounds every
float32 operation once and fuses none, and the orders of the sums are those the formulas name, so equality is to the
bit. Values of 16-bit dtypes are carried in float32 arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelane.report.oracle import F32, Floats, rounded

_LANES = 16
_TAYLOR = tuple(F32(1) / F32(n) for n in (5040, 720, 120, 24, 6, 2, 1, 1))


def _folded(lanes: NDArray[Any]) -> NDArray[Any]:
    """Sixteen lanes of the last axis to their sum: l and l + 8, then l and l + 4, and so on."""
    while lanes.shape[-1] > 1:
        first, second = np.split(lanes, 2, axis=-1)
        lanes = first + second
    return lanes[..., 0]


def _in_lanes(terms: NDArray[Any]) -> NDArray[Any]:
    """The sum over the last axis: element i goes to lane i mod 16, in ascending order."""
    lanes = np.zeros((*terms.shape[:-1], _LANES), terms.dtype)
    for start in range(0, terms.shape[-1], _LANES):
        part = terms[..., start : start + _LANES]
        lanes[..., : part.shape[-1]] += part
    return _folded(lanes)


def exponential(x: Floats) -> Floats:
    """`e^x` by the kernels' own series: 2^n times Taylor's polynomial of degree 7, each operation rounded apart."""
    bounded = np.clip(np.nan_to_num(x, nan=0.0, posinf=88.0, neginf=-87.0), F32(-87), F32(88)).astype(F32)
    n = np.rint(bounded * F32(1.44269504))
    r = (bounded - n * F32(0.693359375)) + n * F32(2.12194440e-4)
    series = np.full(x.shape, _TAYLOR[0], F32)
    for coefficient in _TAYLOR[1:]:
        series = series * r + coefficient
    found = series * np.ldexp(F32(1), n.astype(np.int32)).astype(F32)
    found = np.where(x > F32(88), F32(np.inf), np.where(x < F32(-87), F32(0), found))
    return np.where(np.isnan(x), x, found).astype(F32)


def norm(x: Floats, weight: Floats | None, eps: float, *, weight_in_t: bool, dtype: str) -> Floats:
    """`T(x * r * w)`, or `T(w * T(x * r))`, with `r = 1 / sqrt(f32(mean of x^2) + eps)`, the mean in float64."""
    wide = x.astype(np.float64)
    mean = (_in_lanes(wide * wide) / x.shape[-1]).astype(F32)[..., None]
    found = x * (F32(1) / np.sqrt(mean + F32(eps)))
    if weight is None:
        return rounded(found, dtype)
    return rounded((rounded(found, dtype) if weight_in_t else found) * weight, dtype)


def rotate(x: Floats, cosine: Floats, sine: Floats, dtype: str) -> Floats:
    """`T(T(x c) -+ T(x' s))`, with x' the other half of the head."""
    first, second = np.split(x, 2, axis=-1)
    crossed = np.concatenate([-second, first], axis=-1)
    return rounded(rounded(x * cosine, dtype) + rounded(crossed * sine, dtype), dtype)


def gate(g: Floats, u: Floats, activation: str, dtype: str) -> Floats:
    """`T(T(g / (1 + e^-z)) * u)`: z is g in silu, `2 sqrt(2 / pi) (g + 0.044715 g^3)` in tanh-GELU."""
    with np.errstate(over="ignore", invalid="ignore"):
        z = g if activation == "silu" else F32(1.5957691216) * (g + F32(0.044715) * (g * g * g))
        return rounded(rounded(g / (F32(1) + exponential(-z)), dtype) * u, dtype)


def dense(x: Floats, weight: Floats, bias: Floats | None, dtype: str) -> Floats:
    """`T(x . w + bias)` of `[M, K]` and `[N, K]`, summed in sixteen lanes."""
    sums = _in_lanes(x[:, None, :] * weight[None, :, :])
    return rounded(sums if bias is None else sums + bias, dtype)


def attend(
    q: Floats, keys: NDArray[Any], values: NDArray[Any], factor: np.float32, value_scale: np.float32, dtype: str
) -> Floats:
    """One query `[D]` over the keys and values `[T, D]` that it sees; zeros where it sees none.

    Args:
        q: the query.
        keys: codes or floats.
        values: likewise.
        factor: `f32(scaling * k_scale)`.
        value_scale: 1 for floats.
        dtype: of the activations.
    """
    if not len(keys):
        return np.zeros_like(q)
    scores = factor * _in_lanes(q * keys.astype(F32))
    weights = exponential(scores - scores.max())
    shares = rounded(weights / _in_lanes(weights), dtype)
    total = np.zeros(q.shape, F32)
    for share, value in zip(shares, values.astype(F32), strict=True):
        total = total + share * value
    return rounded(value_scale * total, dtype)
