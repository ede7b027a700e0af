"""`bytelane.numerics` against the oracle and, for `emulated`, against transformers: equal bits, no tolerance.

Shapes and options are drawn by hypothesis, data by NumPy from a drawn seed, so a failure prints everything needed to
repeat it. Outputs are compared as bit patterns: -0.0 is not 0.0, because an int8 code has one zero.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.gemma_quant import QuantizedLinear

import oracle
from bytelane import numerics

F32 = np.float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDED = {"float32": F32, "bfloat16": oracle.to_bfloat16, "float16": oracle.to_float16}
"""float32 values rounded to a dtype, by the oracle."""

several = settings(max_examples=250, deadline=None, derandomize=True, database=None)


def assert_same_bits(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Equal bit patterns as float32 (every float16 and bfloat16 value is one); any NaN equals any other."""
    found = actual.to(torch.float32).numpy()
    assert found.shape == expected.shape
    assert expected.dtype == F32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    same = np.isnan(found) | (found.view(np.int32) == np.ascontiguousarray(expected).view(np.int32))
    assert same.all(), f"{(~same).sum()} of {same.size} differ: {found[~same][:4]} for {expected[~same][:4]}"


def tensor(array, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    if array is None:
        return None
    array = torch.from_numpy(np.array(array))  # a copy: np.float32 scalars become 0-dimensional arrays
    return array if dtype is None else array.to(dtype)


def around(x: np.ndarray) -> np.ndarray:
    """float32 values and the two neighbours of each: decisions that hang on one last bit."""
    return np.concatenate([x, np.nextafter(x, F32(np.inf)), np.nextafter(x, F32(-np.inf))])


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], powers_of_two: bool) -> np.ndarray:
    """Powers of two keep every product exact, which puts many results on exact half steps."""
    exponents = rng.integers(-8, -3, shape)
    mantissas = 1.0 if powers_of_two else rng.uniform(1, 2, shape)
    return (mantissas * 2.0**exponents).astype(F32)


@st.composite
def layers(draw):
    """A dtype's name and the arguments of `linear_integer` in NumPy, x being float32 values that the dtype holds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = draw(st.integers(2, 8))
    groups, size = draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    group_size = size if groups > 1 or draw(st.booleans()) else 0
    m, n, k = draw(st.integers(0, 5)), draw(st.integers(1, 9)), groups * size
    exact = draw(st.booleans())
    name = draw(st.sampled_from(sorted(DTYPES)))
    s_in = random_scales(rng, draw(st.sampled_from([(), (1,)])), exact)
    weight_scale = random_scales(rng, (n, groups), exact)
    # From a fraction of a step to well past saturation.
    spread = draw(st.sampled_from([0.5, 20.0, 100.0, 2000.0]))
    x = rng.normal(size=(m, k)) * spread * s_in
    if exact:
        x = np.round(x / s_in * 2) / 2 * s_in
    x = ROUNDED[name](x.astype(F32))
    codes = random_codes(rng, (n, k), bits)
    s_out = bias = None
    if draw(st.booleans()):
        steps = draw(st.sampled_from([0.3, 30.0, 500.0]))
        size_of_y = 2.0 ** np.round(np.log2(min(spread, 100.0) * 2.0 ** (bits - 2) * np.sqrt(k) * 2.0**-12 / steps))
        s_out = (size_of_y * (1.0 if exact else rng.uniform(1, 2))).astype(F32) * np.ones_like(s_in)
    if draw(st.booleans()):
        bias = (rng.normal(size=n) * 2.0 ** rng.integers(-10, 3, n)).astype(F32)
    arguments = {
        "x": x,
        "codes": codes,
        "weight_scale": weight_scale,
        "input_scale": s_in,
        "output_scale": s_out,
        "bias": bias,
        "group_size": group_size,
    }
    return name, arguments


def run_integer(name: str, a: dict) -> torch.Tensor:
    tensors = {key: tensor(value) for key, value in a.items() if key not in ("x", "group_size")}
    return numerics.linear_integer(tensor(a["x"], DTYPES[name]), group_size=a["group_size"], **tensors)


# The steps, one by one.


@pytest.mark.parametrize("name", DTYPES)
def test_quantize_all_magnitudes(name):
    rng = np.random.default_rng(1)
    # Random bit patterns: every exponent, both signs, subnormals, infinities and NaN.
    x = ROUNDED[name](rng.integers(0, 2**32, 40000, dtype=np.uint32).view(F32))
    for s_in in (F32(0.037), F32(2.0**-5), F32(3.1e4), F32(1e-30)):
        q = numerics.quantize(tensor(x, DTYPES[name]), tensor(s_in))
        assert q.dtype == torch.int8
        np.testing.assert_array_equal(q.numpy(), oracle.quantize(x, s_in))


def test_quantize_special_values():
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 3.4e38, -3.4e38, 1e-45], dtype=F32)
    expected = np.array([127, 127, -128, 0, 127, -128, 0], dtype=np.int8)
    np.testing.assert_array_equal(oracle.quantize(x, F32(0.01)), expected)
    np.testing.assert_array_equal(numerics.quantize(tensor(x), tensor(F32(0.01))).numpy(), expected)


@pytest.mark.parametrize("s_in", [F32(2.0**-4), F32(0.0371), F32(0.3)])
def test_quantize_exact_half_steps(s_in):
    inverse = F32(1) / s_in
    halves = np.arange(-140, 140).astype(F32) + F32(0.5)
    x = (halves / inverse).astype(F32)
    # The product that decides is x * f32(1 / s_in): look for a half step among the neighbours of the quotient.
    x = around(x)
    ties = np.abs(x * inverse) % 1 == 0.5
    assert ties.sum() > 100
    even = 2 * np.round((x * inverse)[ties].astype(np.float64) / 2)
    q = numerics.quantize(tensor(x), tensor(s_in)).numpy()
    np.testing.assert_array_equal(q, oracle.quantize(x, s_in))
    np.testing.assert_array_equal(q[ties], np.clip(even, -128, 127))


def test_quantize_multiplies_by_the_rounded_reciprocal():
    """Division is a near miss; data that does not tell them apart would prove nothing."""
    s_in = F32(0.0371)
    x = (np.arange(-128, 127).astype(F32) + F32(0.5)) / (F32(1) / s_in)
    divided = np.clip(np.rint(x / s_in), -128, 127).astype(np.int8)
    q = numerics.quantize(tensor(x), tensor(s_in)).numpy()
    np.testing.assert_array_equal(q, oracle.quantize(x, s_in))
    assert (q != divided).any()


@several
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(0, 5),
    n=st.integers(1, 7),
    groups=st.integers(1, 5),
    size=st.integers(1, 70),
)
def test_accumulate(seed, m, n, groups, size):
    rng = np.random.default_rng(seed)
    q, w = random_codes(rng, (m, groups * size), 8), random_codes(rng, (n, groups * size), 8)
    for group_size in (0, size):
        acc = numerics.accumulate(tensor(q), tensor(w), group_size)
        assert acc.dtype == torch.int32
        np.testing.assert_array_equal(acc.numpy(), oracle.accumulate(q, w, group_size))


@pytest.mark.parametrize(("left", "right"), list(itertools.product([-128, 127], repeat=2)))
@pytest.mark.parametrize("k", [1, 1024, 131071])
def test_accumulate_extremes(left, right, k):
    """131071 products of -128 by -128 are the longest that fit an int32."""
    q, w = np.full((2, k), left, np.int8), np.full((3, k), right, np.int8)
    acc = numerics.accumulate(tensor(q), tensor(w))
    np.testing.assert_array_equal(acc.numpy(), np.full((2, 3, 1), k * left * right))


@several
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(0, 5),
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    log2_acc=st.integers(1, 31),
    sides=st.tuples(st.booleans(), st.booleans()),
    name=st.sampled_from(sorted(DTYPES)),
    exact=st.booleans(),
)
def test_requantize(seed, m, n, groups, log2_acc, sides, name, exact):
    """Accumulators of every size, far beyond the 2^24 that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    acc = rng.integers(-(2**log2_acc), 2**log2_acc, (m, n, groups))
    weight_scale, s_in = random_scales(rng, (n, groups), exact), random_scales(rng, (1,), exact)
    s_out = bias = None
    if sides[0]:
        s_out = (random_scales(rng, (1,), exact) * F32(2.0 ** (log2_acc - 12))).astype(F32)
    if sides[1]:
        # A bias whose code leaves int32 is outside the definition; the sum with acc may well wrap.
        limit = 2.0**30 * s_in * weight_scale[:, 0]
        bias = np.clip(rng.normal(size=n) * (s_in if s_out is None else 40 * s_out), -limit, limit).astype(F32)
    expected = oracle.requantize(acc, weight_scale, s_in, s_out, bias)
    arguments = (tensor(weight_scale), tensor(s_in), tensor(s_out), tensor(bias))
    y = numerics.requantize(tensor(acc.astype(np.int32)), *arguments, DTYPES[name])
    assert y.dtype == DTYPES[name]
    assert_same_bits(y, ROUNDED[name](expected))
    if s_out is not None:
        codes = oracle.requantize_codes(acc, weight_scale, s_in, s_out, bias)
        np.testing.assert_array_equal(codes.astype(F32) * s_out, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_requantize_exact_half_steps(groups):
    """r = 1/8: every accumulator that is 4 modulo 8 lies half way, the results go to the even neighbour."""
    acc = np.arange(-1100, 1100, dtype=np.int32).reshape(1, -1, 1)
    acc = np.concatenate([acc] + [np.zeros_like(acc)] * (groups - 1), axis=2)
    weight_scale = np.full((acc.shape[1], groups), 0.25, F32)
    y = numerics.requantize(tensor(acc), tensor(weight_scale), tensor(F32(0.5)), tensor(F32(1)), None, torch.float32)
    eighths = acc[0, :, 0]
    floor, rest = eighths // 8, eighths % 8
    exact = np.clip(floor + (rest > 4) + ((rest == 4) & (floor % 2 == 1)), -128, 127)
    assert_same_bits(y[0], exact.astype(F32))
    assert_same_bits(y, oracle.requantize(acc, weight_scale, F32(0.5), F32(1), None))


def test_requantized_zero_is_positive():
    """The output passes through an int8 code, so a small negative accumulator gives 0.0, never -0.0."""
    acc = torch.tensor([[[-1], [0], [1]]], dtype=torch.int32)
    y = numerics.requantize(acc, torch.ones(3, 1), torch.tensor(0.1), torch.tensor(1.0), None, torch.float32)
    assert_same_bits(y, np.zeros((1, 3), F32))


def test_group_sum_order_is_ascending():
    """float32 addition in any other order gives other bits on this data: the order is part of the definition."""
    rng = np.random.default_rng(3)
    acc = rng.integers(-(2**20), 2**20, (50, 50, 6))
    weight_scale, s_in = random_scales(rng, (50, 6), False), F32(0.013)
    y = numerics.requantize(tensor(acc.astype(np.int32)), tensor(weight_scale), tensor(s_in), None, None, torch.float32)
    assert_same_bits(y, oracle.requantize(acc, weight_scale, s_in, None, None))
    descending = oracle.requantize(acc[:, :, ::-1], weight_scale[:, ::-1], s_in, None, None)
    assert (descending != y.numpy()).any()


def test_bias_codes():
    rng = np.random.default_rng(4)
    weight_scale, s_in = random_scales(rng, (4000, 1), False), F32(0.021)
    wanted = rng.integers(-(2**21), 2**21, 4000)
    # Below 2^21 the two float32 roundings on the way out and back cannot reach the next half step.
    bias = (wanted.astype(F32) * (s_in * weight_scale[:, 0])).astype(F32)
    codes = numerics.bias_codes(tensor(bias), tensor(s_in), tensor(weight_scale))
    assert codes.dtype == torch.int32
    np.testing.assert_array_equal(codes.numpy(), wanted)
    np.testing.assert_array_equal(oracle.bias_codes(bias, weight_scale, s_in), wanted)


@pytest.mark.parametrize("biased", [False, True])
def test_requantize_next_to_half_steps(biased):
    """Sums of up to 2^26 next to a half step of the output, where the place of every rounding shows.

    Each rival below is a formula that looks the same; data on which one of them agreed would not have tested it.
    """
    rng = np.random.default_rng(11)
    n = 20000
    weight_scale, s_in = rng.uniform(0.5, 1, (n, 1)).astype(F32), F32(0.0371)
    s_out = F32(s_in * 2.0**26 / 128)
    unit = s_in * weight_scale[:, 0]
    r = unit / s_out
    total = np.rint((rng.integers(-120, 120, n) + 0.5) / r.astype(np.float64)).astype(np.int64) + rng.integers(-2, 3, n)
    bias = (rng.integers(-(2**27), 2**27, n) * unit).astype(F32) if biased else None
    b = oracle.bias_codes(bias, weight_scale, s_in) if biased else np.zeros(n, np.int64)
    acc = (total - b)[None, :, None]
    y = numerics.requantize(
        tensor(acc.astype(np.int32)), tensor(weight_scale), tensor(s_in), tensor(s_out), tensor(bias), torch.float32
    )
    assert_same_bits(y, oracle.requantize(acc, weight_scale, s_in, s_out, bias))
    codes, a = oracle.requantize_codes(acc, weight_scale, s_in, s_out, bias)[0], total.astype(F32)
    rivals = {
        "s_in * (s_w / s_out)": a * (s_in * (weight_scale[:, 0] / s_out)),
        "(s_in / s_out) * s_w": a * ((s_in / s_out) * weight_scale[:, 0]),
        "dequantize, then divide": a * unit / s_out,
        "double": total * r.astype(np.float64),
    }
    if biased:
        rivals["bias rounded alone"] = (acc[0, :, 0].astype(F32) + b.astype(F32)) * r
        rivals["float bias"] = acc[0, :, 0].astype(F32) * r + bias / s_out
    for name, value in rivals.items():
        assert (np.rint(value) != codes).any(), name


def test_bias_codes_next_to_half_steps():
    """The bias is divided by its unit: the product with a reciprocal rounds elsewhere."""
    rng = np.random.default_rng(12)
    weight_scale, s_in = np.tile(random_scales(rng, (4000, 1), False), (3, 1)), F32(0.021)
    unit = s_in * weight_scale[:, 0]
    bias = around(((rng.integers(-500, 500, 4000) + 0.5) * unit[:4000]).astype(F32))
    codes = numerics.bias_codes(tensor(bias), tensor(s_in), tensor(weight_scale)).numpy()
    np.testing.assert_array_equal(codes, oracle.bias_codes(bias, weight_scale, s_in))
    assert (codes != np.rint(bias * (F32(1) / unit))).any()


def test_group_bias_next_to_half_steps():
    """With several groups the bias joins in units of the output, divided by s_out."""
    s_out = F32(0.0371)
    bias = around(((np.arange(-120, 120) + 0.5) * s_out).astype(F32))
    acc, weight_scale = np.zeros((1, bias.size, 2), np.int32), np.full((bias.size, 2), 0.01, F32)
    arguments = (weight_scale, F32(0.1), s_out, bias)
    y = numerics.requantize(tensor(acc), *map(tensor, arguments), torch.float32)
    assert_same_bits(y, oracle.requantize(acc, *arguments))
    assert (np.rint(bias * (F32(1) / s_out)) != oracle.requantize_codes(acc, *arguments)).any()


# The whole integer layer.


@several
@given(layer=layers())
def test_linear_integer(layer):
    name, a = layer
    y = run_integer(name, a)
    assert y.dtype == DTYPES[name]
    assert_same_bits(y, ROUNDED[name](oracle.linear(**a)))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("low", [True, False])
def test_all_codes_at_one_end(bits, group_size, low):
    """Everything at the lowest or the highest code: the largest sums, then an output far past saturation."""
    code = -(2 ** (bits - 1)) if low else 2 ** (bits - 1) - 1
    a = {
        "x": np.full((2, 64), -1e9 if low else 1e9, F32),
        "codes": np.full((5, 64), code, np.int8),
        "weight_scale": np.full((5, 64 // group_size if group_size else 1), 0.013, F32),
        "input_scale": F32(0.07),
        "bias": None,
        "group_size": group_size,
    }
    for output_scale in (None, F32(1e-3), F32(0.11)):
        expected = oracle.linear(output_scale=output_scale, **a)
        assert_same_bits(run_integer("float32", {"output_scale": output_scale, **a}), expected)
    assert (oracle.linear(output_scale=F32(1e-3), **a) == F32(127) * F32(1e-3)).all()


def test_leading_dimensions_and_views():
    rng = np.random.default_rng(5)
    codes, weight_scale = random_codes(rng, (6, 24), 4), random_scales(rng, (6, 1), False)
    wide = rng.normal(size=(2, 3, 50)).astype(F32)
    x = tensor(wide)[..., 1:49:2]
    y = numerics.linear_integer(x, tensor(codes), tensor(weight_scale), tensor(F32(0.03)), tensor(F32(0.01)))
    assert_same_bits(y, oracle.linear(wide[..., 1:49:2], codes, weight_scale, F32(0.03), F32(0.01)))


def test_codes_do_not_depend_on_the_activation_dtype():
    rng = np.random.default_rng(6)
    x = oracle.to_bfloat16(rng.normal(size=4000).astype(F32))
    s_in = tensor(F32(0.0173))
    narrow, wide = numerics.quantize(tensor(x, torch.bfloat16), s_in), numerics.quantize(tensor(x), s_in)
    assert torch.equal(narrow, wide)


# `emulated`: an independent restatement, and transformers' own layer.


def fake_quantize(x: np.ndarray, scale, name: str) -> np.ndarray:
    """`fq` in NumPy: each operation in float32, then rounded to the dtype.

    Dividing or multiplying two values of a narrow dtype in float32 and rounding the result again is what one rounding
    gives: float32 has more than twice their digits and two more.
    """
    rounded = ROUNDED[name]
    s = rounded(np.asarray(scale, F32))
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(np.clip(np.rint(rounded(x / s)), F32(-128), F32(127)) * s)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", [F32(0.0371), F32(2.0**-6), F32(1.7)])
def test_fake_quantize(name, scale):
    rng = np.random.default_rng(7)
    x = rng.normal(size=20000) * 60 * scale
    x[:4] = np.nan, np.inf, -np.inf, -0.0
    x[4:500] = (rng.integers(-140, 140, 496) + 0.5) * scale
    x = ROUNDED[name](x.astype(F32))
    y = numerics.fake_quantize(tensor(x, DTYPES[name]), tensor(scale))
    assert y.dtype == DTYPES[name]
    assert_same_bits(y, fake_quantize(x, scale, name))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("groups", [1, 4])
def test_dequantize_weight(name, groups):
    rng = np.random.default_rng(8)
    codes, scale = random_codes(rng, (30, 32), 8), random_scales(rng, (30, groups), False)
    repeated = np.repeat(ROUNDED[name](scale), 32 // groups, axis=1)
    expected = ROUNDED[name](codes.astype(F32) * repeated)
    assert_same_bits(numerics.dequantize_weight(tensor(codes), tensor(scale), DTYPES[name]), expected)


@several
@given(layer=layers(), with_input_scale=st.booleans())
def test_linear_emulated_restated(layer, with_input_scale):
    """Every rounding around the matmul is restated in NumPy; the matmul itself, whose order of summation is the
    library's affair, is the same call on the same bits."""
    name, a = layer
    input_scale = a["input_scale"] if with_input_scale else None
    x = a["x"] if input_scale is None else fake_quantize(a["x"], input_scale, name)
    groups = a["weight_scale"].shape[1]
    scales = np.repeat(ROUNDED[name](a["weight_scale"]), a["codes"].shape[1] // groups, axis=1)
    weight = ROUNDED[name](a["codes"].astype(F32) * scales)
    dtype = DTYPES[name]
    bias = None if a["bias"] is None else tensor(ROUNDED[name](a["bias"]), dtype)
    expected = torch.nn.functional.linear(tensor(x, dtype), tensor(weight, dtype), bias).to(torch.float32).numpy()
    if a["output_scale"] is not None:
        expected = fake_quantize(expected, a["output_scale"], name)
    y = numerics.linear_emulated(
        tensor(a["x"], dtype),
        tensor(a["codes"]),
        tensor(a["weight_scale"]),
        tensor(input_scale),
        tensor(a["output_scale"]),
        tensor(a["bias"]),
    )
    assert y.dtype == dtype
    assert_same_bits(y, expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("calibrated", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("biased", [False, True])
def test_linear_emulated_equals_transformers(seed, name, bits, calibrated, biased):
    rng = np.random.default_rng(seed)
    k, n, m = 8 * int(rng.integers(1, 40)), int(rng.integers(1, 70)), int(rng.integers(1, 20))
    dtype = DTYPES[name]
    codes = random_codes(rng, (n, k), bits)
    weight_scale = random_scales(rng, (n, 1), False)
    # There a scale of exactly 0 is an uncalibrated side; here it is None.
    s_in, s_out = (F32(scale) if used else F32(0) for scale, used in zip((0.0531, 0.377), calibrated, strict=True))
    bias = rng.normal(size=n).astype(F32) if biased else None
    theirs = QuantizedLinear(k, n, bias=biased, num_bits=bits)
    stored = tensor(codes) if bits == 8 else tensor(oracle.pack_bits(codes, bits))
    parameters = {"weight": stored, "weight_scale": tensor(weight_scale)}
    parameters |= {"input_activation_scale": tensor(s_in), "output_activation_scale": tensor(s_out)}
    if biased:
        parameters["bias"] = tensor(bias, dtype)
    for key, value in parameters.items():
        setattr(theirs, key, torch.nn.Parameter(value, requires_grad=False))
    x = tensor(rng.normal(size=(m, k)).astype(F32) * 3, dtype)
    y = numerics.linear_emulated(
        x,
        tensor(codes),
        tensor(weight_scale),
        tensor(s_in) if calibrated[0] else None,
        tensor(s_out) if calibrated[1] else None,
        tensor(bias),
    )
    assert_same_bits(y, theirs(x).to(torch.float32).numpy())


def test_emulated_is_not_integer():
    """In bfloat16 the two differ; a test where they coincide would not tell which one ran."""
    rng = np.random.default_rng(9)
    x = tensor(rng.normal(size=(8, 256)).astype(F32), torch.bfloat16)
    codes, weight_scale = tensor(random_codes(rng, (64, 256), 4)), tensor(random_scales(rng, (64, 1), False))
    scales = (torch.tensor(0.0173), torch.tensor(0.0531))
    integer = numerics.linear_integer(x, codes, weight_scale, *scales)
    assert not torch.equal(integer, numerics.linear_emulated(x, codes, weight_scale, *scales))


# The oracle's own parts that other tests lean on.


def test_oracle_narrow_floats():
    rng = np.random.default_rng(10)
    x = rng.integers(0, 2**32, 200000, dtype=np.uint32).view(F32)
    # The lower half exactly in the middle: a tie in bfloat16.
    x = np.concatenate([x, (x.view(np.uint32) & 0xFFFF0000 | 0x8000).view(F32)])
    assert_same_bits(tensor(x, torch.bfloat16), oracle.to_bfloat16(x))
    assert_same_bits(tensor(x, torch.float16), oracle.to_float16(x))


@pytest.mark.parametrize("bits", range(2, 9))
def test_oracle_packing(bits):
    rng = np.random.default_rng(bits)
    codes = random_codes(rng, (3, 37), bits)
    packed = oracle.pack_bits(codes, bits)
    assert packed.shape == (3, -(-37 * bits // 8))
    np.testing.assert_array_equal(oracle.unpack_bits(packed, bits, 37), codes)
    # A row read as one number, lowest byte first, holds code i at bit i * bits.
    number = int.from_bytes(packed[1].tobytes(), "little")
    unsigned = [(number >> (i * bits)) % 2**bits - 2 ** (bits - 1) for i in range(37)]
    assert unsigned == codes[1].tolist()
