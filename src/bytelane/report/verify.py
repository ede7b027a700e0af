"""Prove on this machine that the kernels compute what `bytelane.numerics` says: equal, never close.

Every row of the dispatch table that can run here meets seeded problems of every width, dtype and granularity it takes,
on ragged shapes, with saturated codes, exact half steps, NaN and infinities, and is compared with an independent oracle
(`bytelane.report.oracle`) bit for bit. Two operations sum floats, where no order is the right one: their exact problems
(small multiples of powers of two, which no order rounds) are compared bit for bit, and random ones within the bound
that the oracle derives. The native operations between the layers are `bytelane.report.verify_float`'s.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelane.dispatch import TABLE, Kernel, Problem, machine
from bytelane.kernels import cpu
from bytelane.packing import pack_rows
from bytelane.report import oracle
from bytelane.report.kernel_check import KernelCheck
from bytelane.report.verify_float import OPERATIONS, verify_operation

Array = NDArray[Any]

SHAPES = ((1, 17, 64), (1, 66, 129), (3, 5, 96), (16, 33, 160), (17, 70, 257), (130, 9, 512))
"""M, out and in features: decoding and prompts, whole tiles and ragged ones."""
GROUPED = ((1, 33, 256, 128), (5, 18, 384, 64), (17, 7, 96, 32), (2, 5, 65, 13))
"""The same with the inputs that share a scale."""
_HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class _Case:
    """A problem with its arguments and the right answer.

    Attributes:
        about: for messages.
        problem: what the kernel is asked whether it takes.
        arguments: of the operation, on the CPU.
        expected: float32 or integer values.
        bound: how far a result may be from `expected`; None where it must be equal.
    """

    about: str
    problem: Problem
    arguments: tuple[Any, ...]
    expected: Array
    bound: NDArray[np.float64] | None = None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    made = torch.from_numpy(np.array(values))
    return made if dtype is None else made.to(dtype)


class _Maker:
    """Makes the cases of one kernel."""

    def __init__(self, kernel: Kernel, seed: int) -> None:
        self.kernel = kernel
        self.device = kernel.device or "cpu"
        self.rng = np.random.default_rng([seed, zlib.crc32(f"{kernel.op} {kernel.name}".encode())])

    def problem(self, dtype: torch.dtype, bits: int = 8, group: int = 0, rows: int = 1) -> Problem:
        return Problem(self.kernel.op, self.device, dtype, bits, group, rows)

    def codes(self, bits: int, *shape: int) -> NDArray[np.int8]:
        """Random codes; the first row is all smallest, the second all largest."""
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        made = self.rng.integers(low, high + 1, shape).astype(np.int8)
        made[:1], made[1:2] = low, high
        return made

    def scales(self, *shape: int) -> oracle.Floats:
        return self.rng.uniform(1e-3, 2e-2, shape).astype(np.float32)

    def activations(self, m: int, k: int, scale: float, dtype: torch.dtype) -> oracle.Floats:
        """A few steps to far past saturation, exact half steps, and in the last row what is no number."""
        x = (self.rng.normal(size=(m, k)) * scale * self.rng.choice([3, 40, 200], (m, 1))).astype(np.float32)
        x[0] = self.rng.integers(-270, 271, k) * np.float32(scale) / 2
        if m > 2:
            x[-1, : min(k, 4)] = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)[: min(k, 4)]
        return oracle.rounded(x, _name(dtype))

    def shapes(self, bits: int) -> Iterator[tuple[int, int, int, int]]:
        yield from ((m, n, k, 0) for m, n, k in SHAPES)
        yield from (shape for shape in GROUPED if self.kernel.takes_group(shape[3] * bits))


def _quantize(make: _Maker) -> Iterator[_Case]:
    for dtype in sorted(make.kernel.dtypes & {torch.float32, torch.bfloat16, torch.float16}, key=str):
        for scale in (0.25, 0.0131, 3e-39, 1e30):
            for count in (1, 15, 64, 1027):
                x = make.activations(3, count, scale if scale < 1 else 1e30, dtype)
                expected = oracle.quantize(x, np.float32(scale))
                arguments = (_tensor(x, dtype), torch.tensor(scale))
                yield _Case(f"{_name(dtype)} x {count}, scale {scale}", make.problem(dtype), arguments, expected)


def _accumulate(make: _Maker) -> Iterator[_Case]:
    for bits in sorted(make.kernel.bits):
        for m, n, k, group in make.shapes(bits):
            q, w = make.codes(8, m, k), make.codes(bits, n, k)
            arguments = (_tensor(q), pack_rows(_tensor(w), bits), bits, group)
            problem = make.problem(torch.int8, bits, group, m)
            yield _Case(_shape(bits, m, n, k, group), problem, arguments, oracle.accumulate(q, w, group))


def _shape(bits: int, m: int, n: int, k: int, group: int, more: str = "") -> str:
    return f"{bits} bits, {m} x {k} by {n}" + (f", groups of {group}" if group else "") + (f", {more}" if more else "")


def _requantize(make: _Maker) -> Iterator[_Case]:
    for dtype in sorted(make.kernel.dtypes & {torch.float32, torch.bfloat16, torch.float16}, key=str):
        for groups, wide in ((1, True), (1, False), (5, True)):
            acc = make.rng.integers(-(2**30) if wide else -200, 2**30 if wide else 201, (5, 67, groups))
            powers = (2.0 ** make.rng.integers(-7, -3, (67, groups))).astype(np.float32)
            weight_scale = make.scales(67, groups) if wide else powers
            s_in = np.float32(0.0625)
            reach = float(np.abs(acc).max() * s_in * weight_scale.max())
            for s_out in (
                None,
                np.full(1, reach / 100, np.float32),
                np.linspace(reach / 300, reach / 30, 67, dtype="f4"),
            ):
                # what a layer accepts: accumulator and bias together stay within int32
                within = make.rng.uniform(-0.9, 0.9, 67) * float(np.abs(acc).max()) * s_in * weight_scale[:, 0]
                for bias in (None, within.astype(np.float32)):
                    expected = oracle.requantize(acc, weight_scale, s_in, s_out, bias)
                    scales = (None if v is None else _tensor(v) for v in (weight_scale, s_in, s_out, bias))
                    arguments = (_tensor(acc.astype(np.int32)), *scales, dtype)
                    about = f"{_name(dtype)}, {groups} groups, bias {bias is not None}"
                    yield _Case(about, make.problem(dtype, rows=5), arguments, oracle.rounded(expected, _name(dtype)))


def _linear(make: _Maker) -> Iterator[_Case]:
    for dtype in sorted(make.kernel.dtypes & {torch.float32, torch.bfloat16, torch.float16}, key=str):
        for bits in sorted(make.kernel.bits):
            for m, n, k, group in make.shapes(bits):
                w, s_in = make.codes(bits, n, k), np.float32(make.rng.uniform(0.01, 0.1))
                s_w, x = make.scales(n, k // group if group else 1), make.activations(m, k, float(s_in), dtype)
                reach = float(s_in) * float(s_w.max()) * 60 * (1 << (bits - 1)) * math.sqrt(k)
                per_channel = np.linspace(reach / 300, reach / 60, n, dtype=np.float32)
                for s_out, biased in ((np.full(1, reach / 100, np.float32), False), (None, True), (per_channel, True)):
                    bias = make.rng.normal(0, reach / 8, n).astype(np.float32) if biased else None
                    expected = oracle.linear(x, w, s_w, s_in, s_out, bias, group)
                    scales = (None if v is None else _tensor(v) for v in (s_w, s_in, s_out, bias))
                    arguments = (_tensor(x, dtype), pack_rows(_tensor(w), bits), *scales, bits, group)
                    problem = make.problem(dtype, bits, group, m)
                    about = _shape(bits, m, n, k, group, _name(dtype))
                    yield _Case(about, problem, arguments, oracle.rounded(expected, _name(dtype)))


def _embedding(make: _Maker) -> Iterator[_Case]:
    for dtype in sorted(make.kernel.dtypes & {torch.float32, torch.bfloat16, torch.float16}, key=str):
        for bits in sorted(make.kernel.bits):
            for dim, group in ((1, 0), (64, 0), (100, 20), (257, 0), (384, 128)):
                codes, scale = make.codes(bits, 11, dim), make.scales(11, dim // group if group else 1)
                ids, factor = np.array([[10, 0, 3], [3, 3, 7]]), 39.191835884530846
                expected = oracle.embedding(ids, codes, scale, factor, _name(dtype))
                rows = pack_rows(_tensor(codes), bits)
                arguments = (_tensor(ids), rows, _tensor(scale), bits, dim, factor, dtype)
                problem = make.problem(dtype, bits, group, ids.size)
                yield _Case(_shape(bits, 6, 11, dim, group, _name(dtype)), problem, arguments, expected)


def _float_linear(make: _Maker) -> Iterator[_Case]:
    """The two operations that sum floats, on exact problems and on random ones."""
    emulated = make.kernel.op == "linear_emulated"
    for dtype in sorted(make.kernel.dtypes & {torch.float32, torch.bfloat16, torch.float16}, key=str):
        for bits in sorted(make.kernel.bits):
            for (m, n, k, group), exact in ((shape, e) for shape in make.shapes(bits) for e in (True, False)):
                yield _float_case(make, dtype, bits, (m, n, k, group), exact=exact, emulated=emulated)


def _float_case(
    make: _Maker, dtype: torch.dtype, bits: int, shape: tuple[int, int, int, int], *, exact: bool, emulated: bool
) -> _Case:
    (m, n, k, group), name = shape, _name(dtype)
    groups = k // group if group else 1
    w = make.codes(bits, n, k)
    if exact:  # every product is a multiple of 1/32, and every sum of them is a float32
        s_w = (2.0 ** make.rng.integers(-3, 1, (n, groups))).astype(np.float32)
        x = (make.rng.integers(-3, 4, (m, k)) * 0.5).astype(np.float32)
    else:
        s_w, x = make.scales(n, groups), oracle.rounded(make.rng.normal(size=(m, k)), name)
    s_in = np.float32(0.25) if emulated else None
    s_out = np.float32(0.5) if exact else None
    bias = (make.rng.integers(-8, 9, n) * 0.5).astype(np.float32)
    read = x if s_in is None else oracle.fake_quantize(x, s_in, name)
    total, bound = oracle.float_linear(read, oracle.dequantize(w, s_w, name), bias, name)
    expected = total if s_out is None else oracle.fake_quantize(total, s_out, name)
    scales = [None if v is None else _tensor(v) for v in ((s_in,) if emulated else ())]
    sides = [*scales, None if s_out is None else _tensor(s_out), _tensor(bias)]
    arguments = (_tensor(x, dtype), pack_rows(_tensor(w), bits), _tensor(s_w), *sides, bits)
    about = _shape(bits, m, n, k, group, f"{name}, {'exact' if exact else 'random'}")
    problem = make.problem(dtype, bits, group, m)
    return _Case(about, problem, arguments, expected, None if exact else bound)


CASES: dict[str, Callable[[_Maker], Iterator[_Case]]] = {
    "quantize": _quantize,
    "accumulate": _accumulate,
    "requantize": _requantize,
    "linear": _linear,
    "linear_weight_only": _float_linear,
    "linear_emulated": _float_linear,
    "embedding": _embedding,
}
"""The problems of each operation that the oracle has an answer for."""


def _differing(found: Array, case: _Case) -> int:
    """Outputs that are not the expected ones: other bits, or beyond the bound."""
    if case.bound is not None:
        gap = np.abs(found.astype(np.float64) - case.expected.astype(np.float64))
        return int((~(gap <= case.bound)).sum())
    if found.dtype == np.float32:
        return int((found.view(np.int32) != np.ascontiguousarray(case.expected, np.float32).view(np.int32)).sum())
    return int((found != case.expected).sum())


def verify_kernel(kernel: Kernel, *, seed: int = 0) -> KernelCheck:
    """Give one kernel every problem it takes; see `verify_kernels`."""
    here = dataclasses.replace(machine(), isas=cpu.supported_isas())
    if kernel.device == "cuda" and not torch.cuda.is_available():
        return KernelCheck(kernel.name, kernel.op, skipped="there is no CUDA device")
    if kernel.isa is not None and kernel.isa not in here.isas:
        return KernelCheck(kernel.name, kernel.op, skipped=f"this processor has no {kernel.isa}")
    if kernel.op not in CASES:
        return KernelCheck(kernel.name, kernel.op, skipped="the oracle has no such operation")
    make = _Maker(kernel, seed)
    problems = values = differing = 0
    first, refusal = None, "it takes none of the problems"
    for case in CASES[kernel.op](make):
        refused = kernel.refusal(case.problem, here)
        if refused is not None:
            refusal = refused
            continue
        arguments = (a.to(make.device) if isinstance(a, Tensor) else a for a in case.arguments)
        result = kernel.run(*arguments).cpu()
        found = (result.to(torch.float32) if result.dtype.is_floating_point else result).numpy()
        wrong = case.expected.size if found.shape != case.expected.shape else _differing(found, case)
        problems, values, differing = problems + 1, values + case.expected.size, differing + wrong
        if wrong and first is None:
            first = f"{wrong} of {case.expected.size} outputs, {case.about}"
    return KernelCheck(kernel.name, kernel.op, problems, values, differing, first, None if problems else refusal)


def verify_kernels(*, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> tuple[KernelCheck, ...]:
    """Check every kernel that can run on this machine: the dispatch table's, then those between the layers.

    Args:
        seed: of the problems; equal seeds make equal problems.
        progress: called with the kernels done and the kernels in all.
    """
    checks: list[Callable[[], KernelCheck]] = [partial(verify_kernel, kernel, seed=seed) for kernel in TABLE]
    checks += [partial(verify_operation, op, isa, seed=seed) for isa in cpu.compiled_isas() for op in OPERATIONS]
    found = []
    for done, check in enumerate(checks, start=1):
        found.append(check())
        if progress is not None:
            progress(done, len(checks))
    return tuple(found)
