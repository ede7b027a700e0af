"""The operations between the layers, in NumPy: each float32 operation of csrc/cpu/float_ops.hpp and attention.hpp.

Independent of the package. NumPy rounds each float32 operation once and never fuses two, so equality is to the bit.
"""

from __future__ import annotations

import numpy as np

F = np.float32
LANES = 16


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to an activation dtype, half to even, and back."""
    x = np.asarray(x, F)
    if dtype == "float32":
        return x
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(F)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), F("nan"), rounded.view(F))


def exponential(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, F)
    inside = np.clip(np.where(np.isnan(x), F(-87), x), F(-87), F(88))
    n = np.rint(inside * F(1.44269504))
    r = (inside - n * F(0.693359375)) + n * F(2.12194440e-4)
    p = np.full_like(r, F(1 / 5040))
    for c in (F(1 / 720), F(1 / 120), F(1 / 24), F(1 / 6), F(0.5), F(1), F(1)):
        p = p * r + c
    power = ((n.astype(np.int32) + 127) << 23).view(F)
    y = p * power
    y = np.where(x < F(-87), F(0), y)
    y = np.where(x > F(88), F("inf"), y)
    return np.where(np.isnan(x), x, y).astype(F)


def lane_sum(lanes: np.ndarray) -> np.ndarray:
    """Sixteen lanes of the last axis: l and l + 8, then 4, 2, 1."""
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def lanes_of(values: np.ndarray) -> np.ndarray:
    """The last axis padded with zeros to `[..., vectors, 16]`."""
    pad = -values.shape[-1] % LANES
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)])
    return padded.reshape(*values.shape[:-1], -1, LANES)


def dot(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`[..., k]` with `[..., k]`, broadcast: float32, sixteen lanes, ascending."""
    a, b = lanes_of(np.asarray(x, F)), lanes_of(np.asarray(w, F))
    shape = np.broadcast_shapes(a.shape, b.shape)
    total = np.zeros((*shape[:-2], LANES), F)
    for i in range(shape[-2]):
        total = total + a[..., i, :] * b[..., i, :]
    return lane_sum(total)


def dense(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, dtype: str) -> np.ndarray:
    y = dot(x[:, None, :], w[None, :, :])
    return round_to(y if bias is None else y + bias, dtype)


def norm(x: np.ndarray, weight: np.ndarray | None, eps: float, in_t: bool, dtype: str) -> np.ndarray:
    squares = np.asarray(x, np.float64) ** 2
    mean = (squares.sum(-1, keepdims=True) / x.shape[-1]).astype(F)
    y = np.asarray(x, F) * (F(1) / np.sqrt(mean + F(eps)))
    if weight is not None:
        y = (round_to(y, dtype) if in_t else y) * weight
    return round_to(y, dtype)


def rotary(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray, dtype: str) -> np.ndarray:
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return round_to(round_to(x * cosine, dtype) + round_to(turned * sine, dtype), dtype)


def gate(g: np.ndarray, u: np.ndarray, activation: str, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        z = g if activation == "silu" else F(1.5957691216) * (g + F(0.044715) * (g * g * g))
        return round_to(round_to(g / (F(1) + exponential(-z)), dtype) * u, dtype)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, factor: float, v_scale: float, visible: np.ndarray, dtype: str
) -> np.ndarray:
    """One query `[dim]` over keys and values `[tokens, dim]`, of which `visible` (bool) are seen."""
    if not visible.any():
        return np.zeros_like(q)
    k, v = np.asarray(k[visible], F), np.asarray(v[visible], F)
    scores = F(factor) * dot(q[None, :], k)
    e = exponential(scores - scores.max())
    total = np.zeros(LANES, F)
    for vector in lanes_of(e):
        total = total + vector
    p = round_to(e / lane_sum(total), dtype)
    y = np.zeros(v.shape[1], F)
    for t in range(len(p)):
        y = y + p[t] * v[t]
    return round_to(y * F(v_scale), dtype)
