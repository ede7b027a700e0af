"""Prove that the native operations between the layers give their oracle's bits on this machine.

Norms, rotary embedding, gates, attention, the layers that were never quantized and the storing of cache codes are no
rows of the dispatch table: decoder layers call them natively, by instruction set alone. Each is run here on every
instruction set of this processor, in every activation dtype, on ragged widths, with rows that lie apart, keys that are
not visible and gates that are not finite, and compared with `bytelane.report.float_oracle`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelane.kernels import cpu, float_ops
from bytelane.kernels.float_ops import ActivationName, KeyValues, Norm
from bytelane.report import float_oracle, oracle
from bytelane.report.kernel_check import KernelCheck

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WIDTHS = (1, 15, 64, 100, 1536)
HEADS = ((2, 3), (16, 4), (80, 2), (256, 1))
"""Width of a head, heads."""
DENSE = ((1, 130, 100), (3, 67, 16), (9, 5, 1000), (70, 66, 47))
"""Rows, out and in features."""
ATTENTION = ((1, 1, 1, 1, 1, 16), (1, 1, 37, 8, 1, 64), (2, 5, 5, 4, 2, 48), (1, 7, 40, 6, 3, 20), (2, 3, 19, 3, 3, 80))
"""Batch, queries, tokens, heads, KV heads, width of a head."""
STRANGE = (0.0, -0.0, 1e-30, -1e-30, 87.0, -87.5, 88.5, -88.5, 300.0, -300.0, 6e4, -6e4, np.nan, np.inf, -np.inf)

Found = tuple[str, Tensor, NDArray[Any]]
"""What was asked, the kernel's answer, the oracle's."""


class _Maker:
    """Seeded values of one dtype, as a tensor and as the float32 array it holds."""

    def __init__(self, dtype: str, seed: list[int]) -> None:
        self.dtype = dtype
        self.rng = np.random.default_rng(seed)

    def tensor(self, values: NDArray[Any]) -> tuple[Tensor, oracle.Floats]:
        exact = oracle.rounded(values, self.dtype)
        return torch.from_numpy(exact).to(DTYPES[self.dtype]), exact

    def normal(self, *shape: int, scale: float = 1.0) -> tuple[Tensor, oracle.Floats]:
        return self.tensor(self.rng.normal(size=shape) * scale)


def _norm(make: _Maker, isa: str) -> Iterator[Found]:
    for width in WIDTHS:
        (wide, exact), (residual, before) = make.normal(5, width + 40, scale=3), make.normal(5, width)
        x, exact = wide[:, 40:], exact[:, 40:]
        _, weight = make.normal(width)
        scalar = np.float32(0.40625)
        for given, eps, in_t in ((None, 1e-6, False), (weight, 1e-6, False), (weight, 1e-5, True)):
            kind = Norm(None if given is None else torch.from_numpy(given), eps, in_t)
            expected = float_oracle.norm(exact, given, eps, weight_in_t=in_t, dtype=make.dtype)
            yield f"width {width}", float_ops.norm_rows(x, kind, isa=isa), expected
            total = oracle.rounded(oracle.rounded(before + expected, make.dtype) * scalar, make.dtype)
            added = float_ops.norm_rows(x, kind, residual=residual, scalar=torch.tensor(float(scalar)), isa=isa)
            yield f"width {width}, residual and scalar", added, total


def _rotary(make: _Maker, isa: str) -> Iterator[Found]:
    for dim, heads in HEADS:
        x, exact = make.normal(2, 3, heads * dim)
        _, weight = make.normal(dim)
        by_head = exact.reshape(2, 3, heads, dim)
        normed = float_oracle.norm(by_head, weight, 1e-6, weight_in_t=False, dtype=make.dtype)
        for rows in (3, 6):
            (cosine, c), (sine, s) = make.normal(rows, dim), make.normal(rows, dim)
            each = [np.resize(a, (6, dim)).reshape(2, 3, 1, dim) for a in (c, s)]
            for kind, read in ((None, by_head), (Norm(torch.from_numpy(weight), 1e-6), normed)):
                expected = float_oracle.rotate(read, each[0], each[1], make.dtype).reshape(exact.shape)
                found = float_ops.head_rows(x, dim, kind, (cosine, sine), isa=isa)
                yield f"{heads} heads of {dim}, {rows} angles, norm {kind is not None}", found, expected


def _gate(make: _Maker, isa: str) -> Iterator[Found]:
    values = np.concatenate([np.array(STRANGE), make.rng.normal(size=1000) * 4])
    names: tuple[ActivationName, ...] = ("silu", "gelu_pytorch_tanh")
    for name in names:
        (g, exact), (u, up) = make.tensor(np.stack([values, values[::-1]])), make.normal(2, len(values))
        expected = float_oracle.gate(exact, up, name, make.dtype)
        yield name, float_ops.gate_rows(g, u, name, isa=isa), expected


def _dense(make: _Maker, isa: str) -> Iterator[Found]:
    for m, n, k in DENSE:
        (x, left), (w, right) = make.normal(m, k), make.normal(n, k)
        _, bias = make.normal(n)
        for given in (None, bias):
            found = float_ops.dense(x, w, None if given is None else torch.from_numpy(given), isa=isa)
            expected = float_oracle.dense(left, right, given, make.dtype)
            yield f"{m} x {k} by {n}, bias {given is not None}", found, expected


def _attention(make: _Maker, isa: str) -> Iterator[Found]:
    for batch, queries, tokens, heads, kv_heads, dim in ATTENTION:
        q, query = make.normal(batch, queries, heads, dim)
        causal = np.tril(np.ones((queries, tokens), bool), tokens - queries)
        scattered = make.rng.random((batch, queries, tokens)) < 0.5
        scattered[0, 0] = False  # a query that sees no key
        for coded in (True, False):
            shape = batch, kv_heads, tokens, dim
            if coded:
                read_k: NDArray[Any]
                read_v: NDArray[Any]
                read_k, read_v = (make.rng.integers(-128, 128, shape).astype(np.int8) for _ in range(2))
                scales: tuple[np.float32, ...] = np.float32(0.011), np.float32(0.017)
                k, v = torch.from_numpy(read_k), torch.from_numpy(read_v)
                stored = KeyValues(k, v, torch.tensor(0.011), torch.tensor(0.017))
            else:
                (k, read_k), (v, read_v) = make.normal(*shape), make.normal(*shape)
                scales, stored = (np.float32(1), np.float32(1)), KeyValues(k, v)
            masks = (None, np.broadcast_to(causal, scattered.shape)), (scattered, scattered)
            for mask, seen in masks:
                expected = np.zeros(query.shape, np.float32)
                for b, s, h in np.ndindex(batch, queries, heads):
                    keys, values = (t[b, h * kv_heads // heads][seen[b, s]] for t in (read_k, read_v))
                    factor = np.float32(0.3) * scales[0]
                    expected[b, s, h] = float_oracle.attend(query[b, s, h], keys, values, factor, scales[1], make.dtype)
                given = None if mask is None else torch.from_numpy(mask[:, None])
                about = f"{batch} x {queries} queries, {tokens} tokens, {heads}/{kv_heads} heads of {dim}"
                kind = f"{'int8' if coded else 'float'}, {'causal' if mask is None else 'masked'}"
                yield f"{about}, {kind}", float_ops.attention(q, stored, given, 0.3, isa=isa), expected


def _store_codes(make: _Maker, isa: str) -> Iterator[Found]:
    for batch, heads, tokens, dim in ((1, 1, 1, 16), (2, 3, 4, 20), (1, 2, 7, 80)):
        x, exact = make.normal(batch, tokens, heads * dim)
        exact.reshape(-1)[0] = x.view(-1)[0] = np.nan
        states = x.view(batch, tokens, heads, dim).transpose(1, 2)
        values = exact.reshape(batch, tokens, heads, dim).transpose(0, 2, 1, 3)
        room = torch.full((batch, heads, tokens + 5, dim), 99, dtype=torch.int8)
        float_ops.store_codes(states, torch.tensor(0.013), room[:, :, 3 : 3 + tokens], isa=isa)
        expected = np.full(room.shape, 99, np.int64)
        expected[:, :, 3 : 3 + tokens] = oracle.quantize(values, np.float32(0.013))
        yield f"{batch} x {heads} heads x {tokens} tokens of {dim}", room, expected


OPERATIONS: dict[str, Callable[[_Maker, str], Iterator[Found]]] = {
    "norm": _norm,
    "rotary": _rotary,
    "gate": _gate,
    "dense": _dense,
    "attention": _attention,
    "store_codes": _store_codes,
}
"""The native operations between the layers."""


def _differing(found: Tensor, expected: NDArray[Any]) -> int:
    """Values of other bits; any NaN is as good as another."""
    if not found.dtype.is_floating_point:
        return int((found.numpy() != expected).sum())
    values = found.to(torch.float32).numpy()
    if values.shape != expected.shape:
        return expected.size
    same = values.view(np.int32) == np.ascontiguousarray(expected, np.float32).view(np.int32)
    return int((~(same | (np.isnan(values) & np.isnan(expected)))).sum())


def verify_operation(op: str, isa: str, *, seed: int = 0) -> KernelCheck:
    """Give one operation every problem, on one instruction set."""
    name = f"cpu.{isa}.between"
    if isa not in cpu.supported_isas():
        return KernelCheck(name, op, skipped=f"this processor has no {isa}")
    problems = values = differing = 0
    first = None
    for dtype in DTYPES:
        make = _Maker(dtype, [seed, zlib.crc32(f"{op} {dtype}".encode())])
        for about, found, expected in OPERATIONS[op](make, isa):
            wrong = _differing(found, expected)
            problems, values, differing = problems + 1, values + expected.size, differing + wrong
            if wrong and first is None:
                first = f"{wrong} of {expected.size} outputs, {dtype}, {about}"
    return KernelCheck(name, op, problems, values, differing, first)
