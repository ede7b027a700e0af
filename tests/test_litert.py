"""Live parity with the vendor runtime: LiteRT with its default XNNPACK delegate, bit for bit.

Every graph's output is compared with the oracle and with `bytelane.numerics`, as bit patterns. What these tests add to
the recording of `test_golden_linear.py`: the delegate is asked anew, and the bias, which no recording holds. Found so:

    o = clamp(rne(f32(acc + b) * r), -128, 127)        b int32, the sum an integer that wraps

The scale that the bias tensor declares is not read: b counts in units of f32(s_in * s_w[n]) whatever it says.

At 2 and 8 bits the sum wraps at 32 bits. At 4 bits that depends on the kernel the delegate picks for the processor:

    | kernels, LiteRT 2.3.0                                  | the 4-bit sum wraps at |
    | SSE4.2, AVX2                                           | 32 bits                |
    | AVX512-VNNI, Arm NEON, with dot products, with i8mm    | 28 bits                |

(found on Zen 3 and Zen 4 processors and by running the delegate under QEMU 7.2's other models.) So all kernels agree on
sums of -2^27 .. 2^27-1, and bytelane accepts no layer that can leave that range. The tests ask the kernel at hand which
of the two it is with one sum, and then hold it to that for thousands.
"""

from __future__ import annotations

import pathlib
import platform

import numpy as np
import pytest
import torch

import oracle
from bytelane import numerics
from bytelane.kernels import cpu
from bytelane.scheme import accumulator_limit

pytest.importorskip("ai_edge_litert", reason="live parity needs ai-edge-litert (the litert extra)")
if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
    pytest.skip("the closed forms were probed on x86-64 and 64-bit Arm", allow_module_level=True)

from bytelane.report.litert import Graph, NotDelegatedError

ARM = platform.machine() in ("aarch64", "arm64")
CPUINFO = pathlib.Path("/proc/cpuinfo")
F32 = np.float32
WIDTHS = (2, 4, 8)
RAGGED = (1, 3, 7, 8, 17, 31, 64, 100, 129, 257)
"""Sizes around the tiles of any kernel. In units of a byte of codes for in_features: other rows are not delegated."""


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype == F32
    assert actual.shape == expected.shape
    differ = np.ascontiguousarray(actual).view(np.int32) != np.ascontiguousarray(expected).view(np.int32)
    assert not differ.any(), f"{differ.sum()} of {differ.size} differ: {actual[differ][:4]}, {expected[differ][:4]}"


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)


def ragged(rng: np.random.Generator, bits: int) -> tuple[int, int, int]:
    """M, N, K with rows of codes that fill whole bytes."""
    m, n, k = (int(size) for size in rng.choice(RAGGED, 3))
    return m, n, k * (8 // bits)


def numerics_codes_to_y(acc: np.ndarray, weight_scale: np.ndarray, s_in: np.float32, s_out: np.float32) -> np.ndarray:
    """`numerics.requantize` of accumulators that already hold the int32 bias."""
    as_tensors = (torch.from_numpy(np.array(a)) for a in (acc.astype(np.int32), weight_scale, s_in, s_out))
    return numerics.requantize(*as_tensors, None, torch.float32).numpy()


def check(x, codes, bits, weight_scale, s_in, s_out, bias=None) -> np.ndarray:
    """Run the vendor, the oracle and the package on a float input; return the vendor's y."""
    y = Graph(codes, bits, weight_scale, s_in, s_out, bias, x.shape[0])(x)
    column = weight_scale[:, None]
    # A float bias that is exactly what the int32 one stands for; its code must come back before it is relied on.
    real = None if bias is None else bias.astype(F32) * (s_in * weight_scale)
    if bias is not None:
        np.testing.assert_array_equal(oracle.bias_codes(real, column, s_in), bias)
    assert_same_bits(oracle.linear(x, codes, column, s_in, s_out, real), y)
    as_tensors = (None if a is None else torch.from_numpy(np.array(a)) for a in (x, codes, column, s_in, s_out, real))
    assert_same_bits(numerics.linear_integer(*as_tensors).numpy(), y)
    return y


def run_on_codes(q, codes, bits, weight_scale, s_in, s_out, bias, bias_scale=None) -> np.ndarray:
    """Feed input codes (s_in a power of two, so that x = q * s_in quantizes to q); return the output codes."""
    x = q.astype(F32) * s_in
    np.testing.assert_array_equal(oracle.quantize(x, s_in), q)
    y = Graph(codes, bits, weight_scale, s_in, s_out, bias, q.shape[0], bias_scale)(x)
    o = np.rint(y.astype(np.float64) / np.float64(s_out)).astype(np.int8)
    assert_same_bits(o.astype(F32) * s_out, y)
    return o


def wrapped(total: np.ndarray, sum_bits: int) -> np.ndarray:
    """int64 sums as a register of `sum_bits` bits in two's complement holds them."""
    half = 1 << (sum_bits - 1)
    return (total + half) % (2 * half) - half


@pytest.fixture(scope="module")
def sum_bits() -> dict[int, int]:
    """Bits that the vendor's kernel for this processor keeps of `acc + b`, by width of the weights.

    One sum tells: 2^27 comes out as itself of 32 bits, and as -2^27 of 28.
    """
    found = {}
    for bits in WIDTHS:
        q, codes = np.ones((1, 8), np.int8), np.ones((1, 8), np.int8)
        bias = np.array([2**27 - 8], np.int32)
        o = run_on_codes(q, codes, bits, np.ones(1, F32), F32(1), F32(2.0**21), bias)
        found[bits] = {64: 32, -64: 28}[int(o[0, 0])]
    return found


def test_only_4_bit_sums_are_ever_narrow(sum_bits):
    """The table of the module docstring, for the processors in it."""
    assert (sum_bits[2], sum_bits[8]) == (32, 32)
    isas = cpu.supported_isas()
    if ARM or "avx512vnni" in isas:
        assert sum_bits[4] == 28
    elif "AVX512" not in torch.backends.cpu.get_cpu_capability() and "avx_vnni" not in CPUINFO.read_text():
        assert sum_bits[4] == 32


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("bits", WIDTHS)
def test_random_graphs(bits, seed, biased):
    """Ragged sizes; inputs and outputs from a few steps to far past saturation."""
    rng = np.random.default_rng([bits, seed])
    m, n, k = ragged(rng, bits)
    codes = random_codes(rng, (n, k), bits)
    weight_scale = rng.uniform(1e-3, 1e-2, n).astype(F32)
    s_in = F32(rng.uniform(0.005, 0.1))
    x = (rng.normal(size=(m, k)) * s_in * rng.choice([3, 40, 300])).astype(F32)
    acc = oracle.accumulate(oracle.quantize(x, s_in), codes)[:, :, 0]
    reach = int(np.abs(acc).max()) + 1
    bias = rng.integers(-reach, reach, n).astype(np.int32) if biased else None
    s_out = F32(reach * s_in * 5e-3 / rng.choice([5, 100, 1000]))
    check(x, codes, bits, weight_scale, s_in, s_out, bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", WIDTHS)
def test_exact_half_steps(bits, seed, biased):
    """Powers of two everywhere: inputs on half steps, and every eighth output or so."""
    rng = np.random.default_rng([bits, seed, 1])
    _, n, k = ragged(rng, bits)
    # One channel of one input might hold nothing but zeros, which no half step comes from.
    m, n, k = 64, max(n, 17), max(k, 16)
    codes = random_codes(rng, (n, k), bits)
    s_in = F32(2.0**-4)
    x = (rng.integers(-270, 271, (m, k)) * (s_in / 2)).astype(F32)
    weight_scale = (2.0 ** rng.integers(-7, -4, n)).astype(F32)
    acc = oracle.accumulate(oracle.quantize(x, s_in), codes)[:, :, 0]
    bias = rng.integers(-500, 500, n).astype(np.int32) if biased else None
    # At least 2^-6: then no channel's ratio is above 1/8, and accumulators fall between the output steps.
    s_out = F32(2.0 ** max(np.round(np.log2(np.abs(acc).max() * 2.0**-10 / 100)), -6))
    exact = (acc + (0 if bias is None else bias)) * (s_in * weight_scale / s_out).astype(np.float64)
    assert (np.abs(x / s_in) % 1 == 0.5).sum() > x.size // 4
    assert (np.abs(exact) % 1 == 0.5).sum() > 0
    check(x, codes, bits, weight_scale, s_in, s_out, bias)


def test_special_inputs():
    """Both infinities, and magnitudes whose product with 1 / s_in overflows."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 32)).astype(F32)
    x.reshape(-1)[:5] = np.inf, -np.inf, 3e38, -3e38, -0.0
    codes = random_codes(rng, (9, 32), 8)
    check(x, codes, 8, rng.uniform(1e-3, 1e-2, 9).astype(F32), F32(0.0131), F32(0.05))


def test_nan_inputs():
    """127 on x86-64, which is the definition here; Arm's conversion makes it 0."""
    x, codes = np.array([[np.nan, 1, 0, 0, 0, 0, 0, 0]], F32), np.array([[1, 2, 0, 0, 0, 0, 0, 0]], np.int8)
    arguments = (codes, 8, np.ones(1, F32), F32(1), F32(1))
    assert Graph(*arguments)(x) == (2 if ARM else 127)
    if not ARM:
        check(x, *arguments)


def test_small_negative_outputs_are_positive_zero():
    codes = np.array([[1], [-1]], np.int8)
    y = check(np.array([[1.0]], F32), codes, 8, np.array([0.01, 0.01], F32), F32(1), F32(1))
    assert not np.signbit(y).any()


@pytest.mark.parametrize(("bits", "k"), [(2, 120000), (4, 32000), (8, 2400)])
def test_accumulators_beyond_2_24(bits, k):
    """Sums that float32 does not hold; a bias that cancels them shows that acc + b is formed in integers."""
    rng = np.random.default_rng([bits, 3])
    low = -(2 ** (bits - 1))
    codes = rng.integers(low, low // 2 + (bits > 2), (24, k)).astype(np.int8)
    q = rng.integers(-128, -90, (8, k)).astype(np.int8)
    acc = oracle.accumulate(q, codes)
    assert acc.max() > 2**24
    weight_scale = rng.uniform(1e-4, 1e-2, 24).astype(F32)
    s_in = F32(2.0**-5)
    s_out = F32(np.median(acc) * 5e-3 * s_in / 60)
    o = run_on_codes(q, codes, bits, weight_scale, s_in, s_out, None)
    assert_same_bits(o.astype(F32) * s_out, oracle.requantize(acc, weight_scale[:, None], s_in, s_out, None))
    assert_same_bits(o.astype(F32) * s_out, numerics_codes_to_y(acc, weight_scale[:, None], s_in, s_out))
    bias = (-acc[0, :, 0] + rng.integers(-3000, 3000, 24)).astype(np.int32)
    spread = np.median(np.abs(acc[:, :, 0] + bias))
    s_out = F32(spread * 5e-3 * s_in / 40)
    o = run_on_codes(q, codes, bits, weight_scale, s_in, s_out, bias)
    total = acc + bias.astype(np.int64)[None, :, None]
    assert_same_bits(o.astype(F32) * s_out, oracle.requantize(total, weight_scale[:, None], s_in, s_out, None))
    assert_same_bits(o.astype(F32) * s_out, numerics_codes_to_y(total, weight_scale[:, None], s_in, s_out))


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_bias_next_to_half_steps(bits, powers_of_two):
    """The closed form of the bias, on sums chosen to tell it from every near miss.

    Each channel's bias puts acc + b (up to 2^30, at 4 bits to 2^26) on a half step of the output or a few units beside
    it. There the place of every rounding shows: each rival below differs from the vendor somewhere, the closed form
    nowhere. No sum leaves the range on which all of the vendor's kernels agree.
    """
    rng = np.random.default_rng([bits, 4, powers_of_two])
    n, k = 4000, 32
    misses = dict.fromkeys(["bias rounded alone", "two products", "float bias", "double"], 0)
    furthest = (accumulator_limit(bits) + 1) // 2
    for log2 in (22, 24, 26) if bits == 4 else (22, 26, 29):
        codes = random_codes(rng, (n, k), bits)
        q = np.repeat(rng.integers(-128, 128, (1, k)).astype(np.int8), 2, axis=0)
        s_in = F32(2.0**-4)
        weight_scale = (2.0 ** rng.integers(-2, 1, n) if powers_of_two else rng.uniform(0.5, 1, n)).astype(F32)
        s_out = F32(2.0**log2 * s_in / 128)
        acc = oracle.accumulate(q, codes)
        unit = s_in * weight_scale
        r = unit / s_out
        target = np.rint((rng.integers(-120, 120, n) + 0.5) / r.astype(np.float64)).astype(np.int64)
        # Fractions of a unit in the last place of f32(acc + b): the float32 rounding may reach the half step, or not.
        step = np.maximum(1, np.abs(target) // 2**26)
        bias = np.clip(target + rng.integers(-2, 3, n) * step - acc[0, :, 0], -furthest, furthest).astype(np.int32)
        total = acc + bias.astype(np.int64)[None, :, None]
        assert np.abs(total).max() <= accumulator_limit(bits)
        o = run_on_codes(q, codes, bits, weight_scale, s_in, s_out, bias)
        np.testing.assert_array_equal(o, oracle.requantize_codes(total, weight_scale[:, None], s_in, s_out))
        assert_same_bits(o.astype(F32) * s_out, numerics_codes_to_y(total, weight_scale[:, None], s_in, s_out))
        a, b = acc[:, :, 0].astype(F32), bias.astype(F32)
        rivals = {
            "bias rounded alone": (a + b) * r,
            "two products": a * r + b * r,
            "float bias": a * r + (b * unit) / s_out,
            "double": total[:, :, 0] * r.astype(np.float64),
        }
        for name, value in rivals.items():
            misses[name] += int((np.clip(np.rint(value), -128, 127) != o).sum())
    assert min(misses.values()) > 0, misses


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("bits", WIDTHS)
def test_sums_at_the_ends_of_the_accumulator(bits, rows):
    """The outermost sums a layer may have, and a few inside: no kernel wraps there. `rows` brings in other tiles."""
    rng = np.random.default_rng([bits, 5, rows])
    codes, q = random_codes(rng, (64, 256), bits), random_codes(rng, (rows, 256), 8)
    acc = oracle.accumulate(q, codes)
    # Towards one end of the range, an int32 bias can bring only sums that lead there themselves exactly to it. The row
    # that reaches furthest out gets there; the other rows lie inside.
    sign = np.where(np.arange(64) % 2, 1, -1)
    sign = np.where((acc[:, :, 0] * sign).max(axis=0) < 0, -sign, sign)
    reach = (acc[:, :, 0] * sign).max(axis=0)
    inside = np.where(np.arange(64) < 4, 0, rng.integers(0, 1000, 64))
    ends = np.where(sign > 0, accumulator_limit(bits), -accumulator_limit(bits) - 1)
    bias = (ends - sign * (reach + inside)).astype(np.int32)
    total = acc + bias.astype(np.int64)[None, :, None]
    assert (total.max(), total.min()) == (accumulator_limit(bits), -accumulator_limit(bits) - 1)
    weight_scale, s_in = np.full(64, 2.0**-6, F32), F32(2.0**-4)
    s_out = F32(accumulator_limit(bits) / 2**10 / 100)
    o = run_on_codes(q, codes, bits, weight_scale, s_in, s_out, bias)
    assert (np.sign(o) == sign).all()
    np.testing.assert_array_equal(o, oracle.requantize_codes(total, weight_scale[:, None], s_in, s_out))
    assert_same_bits(o.astype(F32) * s_out, numerics_codes_to_y(total, weight_scale[:, None], s_in, s_out))


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("log2", [27, 28, 30, 31])
@pytest.mark.parametrize("bits", WIDTHS)
def test_what_the_kernel_does_with_larger_sums(bits, log2, rows, sum_bits):
    """Beyond what a layer may have: the sum wraps, at the width this kernel has and at no other."""
    rng = np.random.default_rng([bits, 6, log2])
    codes, q = random_codes(rng, (64, 4096), bits), random_codes(rng, (rows, 4096), 8)
    # Biases all over the range, and at its ends: the dot product takes some of those past 2^31, where int32 ends.
    ends = np.where(rng.random(64) < 0.5, 2**log2 - 1, -(2**log2))
    at_an_end = ends - np.sign(ends) * rng.integers(0, 1000, 64)
    bias = np.where(rng.random(64) < 0.5, at_an_end, rng.integers(-(2**log2), 2**log2, 64)).astype(np.int32)
    weight_scale, s_in, s_out = np.full(64, 2.0**-6, F32), F32(2.0**-4), F32(2.0 ** (log2 - 17))
    total = oracle.accumulate(q, codes) + bias.astype(np.int64)[None, :, None]
    held = wrapped(total, sum_bits[bits])
    o = run_on_codes(q, codes, bits, weight_scale, s_in, s_out, bias)
    np.testing.assert_array_equal(o, oracle.requantize_codes(held, weight_scale[:, None], s_in, s_out))
    assert_same_bits(o.astype(F32) * s_out, numerics_codes_to_y(held, weight_scale[:, None], s_in, s_out))
    explained_by = [
        width
        for width in range(24, 33)
        if (oracle.requantize_codes(wrapped(total, width), weight_scale[:, None], s_in, s_out) == o).all()
    ]
    needed = int(np.abs(total).max()).bit_length() + 1
    assert explained_by == ([sum_bits[bits]] if needed > sum_bits[bits] else list(range(needed, 33)))


@pytest.mark.parametrize("factor", [0.5, 16.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_declared_bias_scale_is_not_read(bits, factor):
    rng = np.random.default_rng([bits, 6])
    codes, q = random_codes(rng, (33, 64), bits), random_codes(rng, (5, 64), 8)
    weight_scale, s_in, s_out = rng.uniform(1e-3, 1e-2, 33).astype(F32), F32(2.0**-5), F32(0.01)
    bias = rng.integers(-3000, 3000, 33).astype(np.int32)
    declared = F32(factor) * s_in * weight_scale
    o = run_on_codes(q, codes, bits, weight_scale, s_in, s_out, bias, declared)
    np.testing.assert_array_equal(o, run_on_codes(q, codes, bits, weight_scale, s_in, s_out, bias))


@pytest.mark.parametrize(("bits", "k"), [(2, 30), (4, 31)])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_that_end_inside_a_byte_are_not_delegated(bits, k, biased):
    """The check of `Graph` is what makes the tests above say anything about the delegate: see it refuse."""
    rng = np.random.default_rng(7)
    bias = np.zeros(5, np.int32) if biased else None
    with pytest.raises(NotDelegatedError):
        Graph(random_codes(rng, (5, k), bits), bits, np.full(5, 0.01, F32), F32(0.1), F32(0.1), bias)
