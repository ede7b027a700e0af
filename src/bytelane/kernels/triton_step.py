"""What lies between the linear layers of one token, in Triton: heads, attention, gates and sums, a launch each.

    heads     q = rotary(norm(q)), k = rotary(norm(k)), v = norm(v); k and v go to their place of the cache, as codes
    parts     of 64 keys (32 of wide heads): the largest score, the sum of exponentials, the weighted sum of the values
    joined    the parts of a head as one, in ascending order
    gate      T(T(g / (1 + exp(-z))) * u)
    join      h = T(h + norm(y)), T(h * scalar) where the layer has one, and n = norm(h) for whoever reads h next

Heads, gates, sums and norms are the bits of the CPU (csrc/cpu/float_ops.hpp has the formulas and their roundings).
Attention has the CPU's formula, but the GPU's own sums and exponentials, and does not round the weights to T:

    s[t] = f32(scaling * k_scale) * sum_d q[d] * k[t,d]      y[d] = T(v_scale * sum_t e[t] * v[t,d] / sum_t e[t])

Codes are read as they lie in the cache. The parts are the same whatever the cache's length, so its bits are, too.

Every kernel waits for the one before (`gdc_wait`) before it reads anything that changes from token to token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bytelane.kernels.triton_codes import ROUND, quantize_codes, rounded_to


@triton.jit
def _root(values, width, eps):
    """`1 / sqrt(f32(mean of squares) + eps)`; see `triton_pointwise.norm_rows`."""
    wide = values.to(tl.float64)
    mean = (tl.sum(wide * wide, 0) / width).to(tl.float32)
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(mean + eps))


@triton.jit
def _scaled(
    values,
    root,
    weight,
    at,
    inside,
    dtype: tl.constexpr,
    WEIGHT: tl.constexpr,
    IN_T: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    """Values times `root` and the norm's weight, rounded as the norm does."""
    normal = values * root
    if WEIGHT:
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        if IN_T:
            normal = rounded_to(normal, dtype).to(tl.float32)
        if PLUS_ONE:
            w = 1.0 + w
        normal = normal * w
    return rounded_to(normal, dtype).to(tl.float32)


@triton.jit
def _exponential(x):
    """exp(x) as csrc/cpu/float_ops.hpp defines it: every operation rounded apart."""
    inside = tl.where(x > -87.0, tl.where(x < 88.0, x, 88.0), -87.0)  # NaN goes through the first bound
    n = (inside * 1.44269504 + ROUND) - ROUND
    r = (inside - n * 0.693359375) + n * 2.12194440e-4
    p = tl.full(x.shape, 1.0 / 5040.0, tl.float32)
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    y = p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < -87.0, 0.0, y)
    y = tl.where(x > 88.0, float("inf"), y)
    return tl.where(x == x, y, x)


@triton.jit
def _head(
    x,
    weight,
    cosine,
    sine,
    dim,
    eps,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    IN_T: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head, as float32 values of T."""
    i = tl.arange(0, BLOCK)
    inside = i < dim
    values = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        root = _root(values, dim, eps)
        values = _scaled(values, root, weight, i, inside, dtype, WEIGHT, IN_T, PLUS_ONE)
    if ROTARY:
        half = dim // 2
        j = tl.where(i < half, i + half, i - half)
        others = tl.load(x + j, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            others = _scaled(others, root, weight, j, inside, dtype, WEIGHT, IN_T, PLUS_ONE)
        c = tl.load(cosine + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sine + i, mask=inside, other=0.0).to(tl.float32)
        turned = rounded_to(others * s, dtype).to(tl.float32)
        turned = tl.where(i < half, -turned, turned)
        values = rounded_to(rounded_to(values * c, dtype).to(tl.float32) + turned, dtype).to(tl.float32)
    return values


@triton.jit
def _write(place, values, scale, inside, CODES: tl.constexpr):
    if CODES:
        codes = quantize_codes(values, tl.math.div_rn(1.0, tl.load(scale)))
        tl.store(place, codes, mask=inside)
    else:
        tl.store(place, rounded_to(values, place.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def step_heads(
    q,
    k,
    v,
    q_weight,
    k_weight,
    v_weight,
    cosine,
    sine,
    position,
    key_scale,
    value_scale,
    y,
    keys,
    values,
    heads,
    kv_heads,
    dim,
    length,
    eps,
    Q_NORM: tl.constexpr,
    V_NORM: tl.constexpr,
    V_WEIGHT: tl.constexpr,
    IN_T: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes a head: of q to `y` `[heads, dim]`, of k and v to `[KV heads, length, dim]` at `position`.

    With as many programs as `heads` there is no k and no v: the layer reads another one's cache. Q_NORM holds for
    k, too.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < dim
    dtype: tl.constexpr = y.dtype.element_ty
    if head < heads:
        at = q + head * dim
        made = _head(at, q_weight, cosine, sine, dim, eps, dtype, Q_NORM, Q_NORM, IN_T, PLUS_ONE, True, BLOCK)
        tl.store(y + head * dim + i, rounded_to(made, dtype), mask=inside)
    else:
        place = tl.load(position).to(tl.int64)
        if head < heads + kv_heads:
            row = head - heads
            at = k + row * dim
            made = _head(at, k_weight, cosine, sine, dim, eps, dtype, Q_NORM, Q_NORM, IN_T, PLUS_ONE, True, BLOCK)
            _write(keys + (row * length + place) * dim + i, made, key_scale, inside, CODES)
        else:
            row = head - heads - kv_heads
            at = v + row * dim
            made = _head(at, v_weight, cosine, sine, dim, eps, dtype, V_NORM, V_WEIGHT, IN_T, PLUS_ONE, False, BLOCK)
            _write(values + (row * length + place) * dim + i, made, value_scale, inside, CODES)


@triton.jit(do_not_specialize=["length", "window"])
def attend_parts(
    q,
    keys,
    values,
    position,
    key_scale,
    most,
    total,
    sums,
    group,
    dim,
    length,
    window,
    scaling,
    CODES: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes a head and BT keys: `most` and `total` `[heads, parts]`, `sums` `[heads, parts, dim]`, float32.

    A part none of whose keys is visible leaves a total of 0, and its sums unwritten. A window of 0 is none.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    part = tl.program_id(1)
    place = head * tl.num_programs(1) + part
    last = tl.load(position).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(last - window + 1, 0), 0)
    begin = part * BT
    if (begin > last) | (begin + BT <= first):
        tl.store(most + place, -float("inf"))
        tl.store(total + place, 0.0)
    else:
        t = begin + tl.arange(0, BT)
        i = tl.arange(0, BLOCK)
        row = (head // group).to(tl.int64) * length
        seen = (t <= last) & (t >= first)
        at = (row + t)[:, None] * dim + i[None, :]
        inside = seen[:, None] & (i < dim)[None, :]
        k = tl.load(keys + at, mask=inside, other=0).to(tl.float32)
        v = tl.load(values + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(q + head * dim + i, mask=i < dim, other=0.0).to(tl.float32)
        factor = scaling
        if CODES:
            factor = factor * tl.load(key_scale)
        scores = tl.where(seen, factor * tl.sum(k * x[None, :], 1), -float("inf"))
        high = tl.max(scores, 0)
        e = tl.exp(scores - high)
        tl.store(most + place, high)
        tl.store(total + place, tl.sum(e, 0))
        tl.store(sums + place.to(tl.int64) * dim + i, tl.sum(v * e[:, None], 0), mask=i < dim)


@triton.jit(do_not_specialize=["parts"])
def attend_joined(
    most,
    total,
    sums,
    value_scale,
    y,
    parts,
    dim,
    CODES: tl.constexpr,
    BP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The parts of a head, BP at a time, to `y` `[heads, dim]`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    high = -float("inf")
    for begin in range(0, parts, BP):
        p = begin + tl.arange(0, BP)
        high = tl.maximum(high, tl.max(tl.load(most + head * parts + p, mask=p < parts, other=-float("inf")), 0))
    whole = 0.0
    found = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, parts, BP):
        p = begin + tl.arange(0, BP)
        count = tl.load(total + head * parts + p, mask=p < parts, other=0.0)
        weight = tl.exp(tl.load(most + head * parts + p, mask=p < parts, other=-float("inf")) - high)
        at = (head * parts + p).to(tl.int64)[:, None] * dim + i[None, :]
        there = (count > 0.0)[:, None] & (i < dim)[None, :]
        whole += tl.sum(count * weight, 0)
        found += tl.sum(tl.load(sums + at, mask=there, other=0.0) * weight[:, None], 0)
    found = tl.math.div_rn(found, whole)
    if CODES:
        found = found * tl.load(value_scale)
    tl.store(y + head * dim + i, rounded_to(found, y.dtype.element_ty), mask=i < dim)


@triton.jit
def gate_row(gate, up, y, width, SILU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """`T(T(act(gate)) * up)` of one row; a program takes BLOCK elements."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    dtype: tl.constexpr = y.dtype.element_ty
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    z = g
    if not SILU:
        z = 1.5957691216 * (g + 0.044715 * (g * g * g))
    active = rounded_to(tl.math.div_rn(g, 1.0 + _exponential(-z)), dtype).to(tl.float32)
    tl.store(y + i, rounded_to(active * u, dtype), mask=inside)


@triton.jit
def join_row(
    stream,
    branch,
    weight,
    scalar,
    next_weight,
    y,
    n,
    width,
    eps,
    next_eps,
    NORM: tl.constexpr,
    SCALAR: tl.constexpr,
    NEXT: tl.constexpr,
    IN_T: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y = T(stream + norm(branch))`, times the scalar, and `n = norm(y)`, of one row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.arange(0, BLOCK)
    inside = i < width
    dtype: tl.constexpr = y.dtype.element_ty
    values = tl.load(branch + i, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        values = _scaled(values, _root(values, width, eps), weight, i, inside, dtype, True, IN_T, PLUS_ONE)
    held = tl.load(stream + i, mask=inside, other=0.0).to(tl.float32)
    values = rounded_to(held + values, dtype).to(tl.float32)
    if SCALAR:
        # the scalar multiplies in T
        values = rounded_to(values * rounded_to(tl.load(scalar).to(tl.float32), dtype).to(tl.float32), dtype)
        values = values.to(tl.float32)
    tl.store(y + i, rounded_to(values, dtype), mask=inside)
    if NEXT:
        root = _root(values, width, next_eps)
        normal = _scaled(values, root, next_weight, i, inside, dtype, True, IN_T, PLUS_ONE)
        tl.store(n + i, rounded_to(normal, dtype), mask=inside)
