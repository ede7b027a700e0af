"""Writes what driver.cpp runs: inputs, and the bytes that the NumPy oracles expect. Needs NumPy alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import float_oracle
import oracle

OPS = (
    *("accumulate", "linear", "quantize", "requantize", "norm", "head", "gate", "dense", "attention", "store"),
    *("weight_only", "embedding", "add"),
)
DTYPES = ("float32", "bfloat16", "float16")
HALVES = DTYPES[1:]
F = np.float32
GROUPS = ((1, 1), (96, 3), (96, 32), (65, 13), (576, 576), (1536, 128), (2600, 8), (300, 100))


class Writer:
    """Appends cases to a file."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.count = 0

    def case(self, op: str, params: tuple, *buffers) -> None:
        """One case; the last buffer is the expected result, None is an absent one."""
        self.count += 1
        self.file.write(np.array([OPS.index(op), len(params)], np.int32).tobytes())
        self.file.write(np.array(params, np.int64).tobytes())
        self.file.write(np.int32(len(buffers)).tobytes())
        for buffer in buffers:
            data = None if buffer is None else np.ascontiguousarray(buffer).tobytes()
            self.file.write(np.int64(-1 if data is None else len(data)).tobytes() + (data or b""))


def stored(x, dtype: str) -> np.ndarray:
    """float32 values of a dtype as the bytes of that dtype."""
    x = np.ascontiguousarray(x, F)
    if dtype == "float32":
        return x
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16)
    return (float_oracle.round_to(x, dtype).view(np.uint32) >> 16).astype(np.uint16)


def codes_of(rng, bits: int, *shape) -> np.ndarray:
    return rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int8)


def accumulators(out: Writer, rng, bits: int) -> None:
    def case(q, w, group_size=0, packed=None):
        rows = oracle.pack_bits(w, bits) if packed is None else packed
        acc = oracle.accumulate(q, w, group_size).astype(np.int32)  # wraps, as the kernels do
        out.case("accumulate", (*q.shape[:1], *w.shape, bits, group_size), q, rows, acc)

    for k in (1, 2, 3, 7, 8, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 576):
        for m, n in ((0, 5), (1, 1), (1, 17), (2, 5), (3, 17), (4, 3), (17, 5)):
            case(codes_of(rng, 8, m, k), codes_of(rng, bits, n, k))
    for m, n, k in ((1, 66, 1536), (13, 70, 1000), (30, 130, 700), (49, 70, 1100)):
        case(codes_of(rng, 8, m, k), codes_of(rng, bits, n, k))
    if bits == 4:  # tile registers take panels side by side, the last of them alone
        for m, n, k in ((270, 1029, 4000), (100, 580, 12300)):
            case(codes_of(rng, 8, m, k), codes_of(rng, bits, n, k))
    for k, group_size in GROUPS:
        for m, n in ((1, 17), (2, 1), (5, 66), (13, 66)):
            case(codes_of(rng, 8, m, k), codes_of(rng, bits, n, k), group_size)
    if 128 % bits == 0:
        for group_bits in (64, 128, 256, 384, 512, 1024):
            size = group_bits // bits
            for m, n, groups in ((1, 66, 3), (2, 5, 2), (7, 6, 9), (13, 7, 5)):
                case(codes_of(rng, 8, m, size * groups), codes_of(rng, bits, n, size * groups), size)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for k in (1, 33, 100, 6144, 131072):
        for w in (low, high):
            packed = np.repeat(oracle.pack_bits(np.full((1, k), w), bits), 5, axis=0)
            for a in (-128, 127):
                for m in (3, 13) if k > 6144 else (3, 13, 20):
                    case(np.full((m, k), a, np.int8), np.full((5, k), w, np.int8), 0, packed)
    case(np.eye(137, dtype=np.int8), codes_of(rng, bits, 9, 137))  # every code at every place


def layers(out: Writer, rng, bits: int) -> None:
    def case(x, dtype, w, scale, s_in, s_out, bias, group_size=0):
        x = float_oracle.round_to(x, dtype)
        y = oracle.linear(x, w, scale, s_in, s_out, bias, group_size)
        stride = 0
        sizes = (*x.shape[:1], *w.shape, bits, group_size, DTYPES.index(dtype), stride)
        rows = oracle.pack_bits(w, bits)
        out.case("linear", sizes, stored(x, dtype), rows, scale, s_in, s_out, bias, stored(y, dtype))

    for dtype in DTYPES:
        for k, group_size in ((100, 0), (512 // bits, 256 // bits), (1024, 128), (100, 20)):
            group_size = group_size if k % max(group_size, 1) == 0 else 0
            for m, n in ((1, 65), (7, 18), (14, 70)):
                w, scale = codes_of(rng, bits, n, k), rng.uniform(1e-4, 0.02, (n, k // (group_size or k))).astype(F)
                s_in, s_out = (F(rng.uniform(0.01, 0.1)) for _ in range(2))
                x, bias = rng.normal(0, 2, (m, k)).astype(F), rng.normal(0, 1, n).astype(F)
                for output_scale in (s_out, None):
                    for b in (bias, None):
                        case(x, dtype, w, scale, s_in, output_scale, b, group_size)
        w = codes_of(rng, bits, 33, 100)
        halves = (rng.integers(-40, 40, (4, 100)) / 2).astype(F)  # outputs on half steps
        case(halves, dtype, w, np.full((33, 1), 2.0**-bits, F), F(1), F(2), np.linspace(-3, 3, 33, dtype=F))
        odd = rng.normal(0, 2, (6, 100)).astype(F)
        odd[0, :9] = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38)
        odd[1], odd[2], odd[3] = np.nan, -np.inf, 0
        with np.errstate(over="ignore"):
            case(odd, dtype, w, np.full((33, 1), 0.01, F), F(0.04), F(0.07), None)


def codes_alone(out: Writer, rng) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    for dtype in HALVES:
        bits = patterns.astype(np.uint16)
        with np.errstate(invalid="ignore"):
            x = bits.view(np.float16).astype(F) if dtype == "float16" else (patterns << 16).astype(np.uint32).view(F)
        for scale in (1.0, 0.037, 1e-30, 3e30):
            out.case("quantize", (1 << 16, DTYPES.index(dtype)), bits, F(scale), oracle.quantize(x, F(scale)))
    for count in (0, 1, 2, 63, 64, 65, 129, 16385, 100001):
        x = rng.normal(0, 3, count).astype(F)
        out.case("quantize", (count, 0), x, F(0.04), oracle.quantize(x, F(0.04)))
    halves = np.arange(-300, 300, dtype=F) / 2
    near = np.concatenate([halves, np.nextafter(halves, F(1e9)), np.nextafter(halves, F(-1e9)), F([np.nan, np.inf])])
    for scale in (1.0, 0.5, 0.1):
        x = near * F(scale)
        out.case("quantize", (x.size, 0), x, F(scale), oracle.quantize(x, F(scale)))
    for dtype in DTYPES:
        for groups in (1, 2, 7):
            for m, n in ((0, 3), (1, 1), (5, 63), (2, 65), (70, 260)):
                spread = 2.0 ** rng.integers(0, 32, (m, n, groups))
                acc = np.clip(rng.normal(0, 1, (m, n, groups)) * spread, -(2**31), 2**31 - 2**20).astype(np.int32)
                scale = (2.0 ** rng.uniform(-30, 2, (n, groups))).astype(F)
                bias = (rng.normal(0, 1, n) * scale[:, 0] * 1000).astype(F)
                for s_out in (F(0.07), None):
                    for b in (bias, None):
                        y = stored(oracle.requantize(acc, scale, F(0.03), s_out, b), dtype)
                        sizes = (m, n, groups, DTYPES.index(dtype))
                        out.case("requantize", sizes, acc, scale, F(0.03), s_out, b, y)
    for dtype in DTYPES:
        x = float_oracle.round_to(rng.normal(0, 1, (2, 4, 3, 20)), dtype)
        q = oracle.quantize(x, F(0.013)).transpose(0, 2, 1, 3)
        out.case("store", (2, 4, 3, 20, DTYPES.index(dtype)), stored(x, dtype), F(0.013), q)


def weight_only(x, w, scale, s_out, bias, bits: int, dtype: str) -> np.ndarray:
    """See csrc/cpu/weight_only.hpp and weight_digits.hpp."""

    def rounded(v):
        return float_oracle.round_to(v, dtype)

    scale = rounded(scale)
    if bits == 2 and scale.shape[1] == 1:
        exponent = np.frexp(np.abs(x).max(1, keepdims=True))[1]
        fixed = np.rint(np.ldexp(x.astype(np.float64), 22 - exponent)).astype(np.int64)
        total = (fixed @ w.astype(np.int64).T).astype(np.float64) * scale[:, 0].astype(np.float64)
        y = np.ldexp(total, exponent - 22).astype(F)
    else:
        values = rounded(w.astype(F) * np.repeat(scale, w.shape[1] // scale.shape[1], axis=1))
        y = float_oracle.dot(x[:, None, :], values[None])
    if bias is not None:
        y = y + rounded(bias)
    if s_out is None:
        return y
    step = rounded(s_out)
    return np.clip(np.rint(rounded(rounded(y) / step)), F(-128), F(127)) * step


def float_weights(out: Writer, rng, bits: int) -> None:
    for dtype in HALVES:
        for m, n, k, groups in (
            (1, 65, 1536, 1),
            (1, 1, 1, 1),
            (2, 5, 15, 1),
            (1, 66, 17, 1),
            (3, 7, 100, 5),
            (8, 67, 1000, 1),
        ):
            w, scale = codes_of(rng, bits, n, k), (rng.uniform(0.1, 1, (n, groups)) * 0.05).astype(F)
            x, bias = float_oracle.round_to(rng.normal(0, 1, (m, k)), dtype), rng.normal(0, 1, n).astype(F)
            for s_out, b in ((None, None), (F(0.07), bias)):
                y = stored(weight_only(x, w, scale, s_out, b, bits, dtype), dtype)
                sizes = (m, n, k, bits, groups, DTYPES.index(dtype))
                out.case("weight_only", sizes, stored(x, dtype), oracle.pack_bits(w, bits), scale, s_out, b, y)
    for dtype in DTYPES:
        for dim, groups in ((1, 1), (7, 1), (100, 5), (256, 8), (1000, 1), (130, 130)):
            w, scale = codes_of(rng, bits, 11, dim), rng.uniform(0.01, 1, (11, groups)).astype(F)
            ids = np.array([10, 0, 3, 3, 7])
            steps = np.repeat(float_oracle.round_to(scale, dtype), dim // groups, axis=1)
            y = stored(float_oracle.round_to(w.astype(F) * steps, dtype)[ids] * F(39.191835), dtype)
            sizes = (len(ids), dim, groups, bits, DTYPES.index(dtype))
            out.case("embedding", sizes, ids, oracle.pack_bits(w, bits), scale, F(39.191835), y)


def between(out: Writer, rng, dtype: str) -> None:
    code = DTYPES.index(dtype)

    def values(*shape, scale=1.0):
        return float_oracle.round_to(rng.normal(0, scale, shape), dtype)

    for width in (1, 15, 64, 100, 1536):
        x, weight, residual = values(5, width, scale=3), values(width), values(5, width)
        for w, in_t in ((None, False), (weight, False), (weight, True)):
            y = float_oracle.norm(x, w, 1e-6, in_t, dtype)
            eps = F(1e-6)
            out.case("norm", (5, width, code, in_t), stored(x, dtype), w, None, None, eps, stored(y, dtype))
            total = float_oracle.round_to(float_oracle.round_to(residual + y, dtype) * F(0.40625), dtype)
            inputs = stored(x, dtype), w, stored(residual, dtype), F(0.40625), eps
            out.case("norm", (5, width, code, in_t), *inputs, stored(total, dtype))
    for dim in (2, 16, 80, 256):
        x, weight, cosine, sine = values(6, 4, dim), values(dim), values(3, dim), values(3, dim)
        for w in (weight, None):
            normed = x if w is None else float_oracle.norm(x, w, 1e-6, False, dtype)
            y = float_oracle.rotary(normed, *(np.tile(a, (2, 1))[:, None] for a in (cosine, sine)), dtype)
            inputs = stored(x, dtype), w, stored(cosine, dtype), stored(sine, dtype), F(1e-6)
            out.case("head", (6, 4, dim, 3, code), *inputs, stored(y, dtype))
    special = F([0.0, -0.0, 1e-30, -1e-30, 87.0, -87.5, 88.5, -88.5, 300.0, -300.0, 6e4, -6e4, np.nan])
    gate = float_oracle.round_to(np.concatenate([special, rng.normal(0, 4, 1000).astype(F)])[None].repeat(3, 0), dtype)
    up = values(*gate.shape)
    for number, activation in enumerate(("gelu_tanh", "silu")):
        y = float_oracle.gate(gate, up, activation, dtype)
        out.case("gate", (*gate.shape, number, code), stored(gate, dtype), stored(up, dtype), stored(y, dtype))
    for count in (1, 64, 1000):
        a, b = values(count), values(count)
        out.case("add", (count, code), stored(a, dtype), stored(b, dtype), stored(a + b, dtype))
    for m, n, k in ((1, 1, 1), (1, 130, 100), (3, 67, 16), (9, 5, 1000), (70, 66, 47)):
        x, w, bias = values(m, k), values(n, k), values(n)
        for b in (bias, None):
            y = float_oracle.dense(x, w, b, dtype)
            out.case("dense", (m, n, k, code), stored(x, dtype), stored(w, dtype), b, stored(y, dtype))
    for shape in (
        (1, 1, 1, 1, 1, 16),
        (1, 1, 37, 8, 1, 64),
        (2, 5, 5, 4, 2, 48),
        (1, 7, 40, 6, 3, 20),
        (2, 3, 19, 3, 3, 80),
    ):
        for coded in (True, False):
            attention(out, rng, dtype, shape, coded)


def attention(out: Writer, rng, dtype: str, shape: tuple[int, ...], coded: bool) -> None:
    batch, queries, tokens, heads, kv_heads, dim = shape
    q = float_oracle.round_to(rng.normal(0, 1, (batch, queries, heads, dim)), dtype)
    room = (batch, kv_heads, tokens, dim)
    k, v = (codes_of(rng, 8, *room) if coded else float_oracle.round_to(rng.normal(0, 1, room), dtype) for _ in "kv")
    scales = (F(0.011), F(0.017)) if coded else (None, None)
    k_scale, v_scale = (F(1) if s is None else s for s in scales)
    scattered = rng.random((batch, queries, tokens)) < 0.5
    scattered[0, 0] = False  # a query that sees nothing
    causal = np.tril(np.ones((queries, tokens), bool), tokens - queries)[None].repeat(batch, 0)
    for mask in (None, scattered):
        seen = causal if mask is None else mask
        y = np.zeros_like(q)
        for b, s, h in np.ndindex(batch, queries, heads):
            at = b, h * kv_heads // heads
            y[b, s, h] = float_oracle.attend(q[b, s, h], k[at], v[at], F(0.3) * k_scale, v_scale, seen[b, s], dtype)
        inputs = (k, v) if coded else (stored(k, dtype), stored(v, dtype))
        buffers = stored(q, dtype), *inputs, *scales, F(0.3), mask, stored(y, dtype)
        out.case("attention", (*shape, DTYPES.index(dtype)), *buffers)


def main(path: str) -> None:
    with open(path, "wb") as file:
        out = Writer(file)
        for bits in range(2, 9):
            rng = np.random.default_rng(bits)
            accumulators(out, rng, bits)
            layers(out, rng, bits)
            float_weights(out, rng, bits)
        codes_alone(out, np.random.default_rng(0))
        for dtype in DTYPES:
            between(out, np.random.default_rng(1), dtype)
    print(f"{out.count} cases, {Path(path).stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
