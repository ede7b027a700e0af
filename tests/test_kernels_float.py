"""The native kernels that make floats of packed codes: the embedding, bit for bit, and the weight-only layer.

The weight-only layer sums floats, so it has no equality with another order of summation. It is compared with float64,
within a bound that follows from its arithmetic, and with itself, bit for bit, over everything that must not matter.
"""

import math

import numpy as np
import pytest
import torch

import oracle
from bytelane import numerics
from bytelane.kernels import cpu, reference
from bytelane.packing import pack_rows
from test_kernels import ALL_BITS, DTYPES, ISAS, GuardedPages, generator, random_codes

HALVES = (torch.bfloat16, torch.float16)
SAME_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a, b):
    view = SAME_BITS[a.dtype]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(view), b.view(view))


def random_table(rng, rows, dim, bits, groups=1):
    codes = random_codes(rng, bits, rows, dim)
    scale = torch.from_numpy((2.0 ** rng.uniform(-12, 1, (rows, groups))).astype(np.float32))
    return torch.from_numpy(codes), pack_rows(torch.from_numpy(codes), bits), scale


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- embedding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_the_reference_bit_for_bit(isa, bits, dtype):
    rng = generator(bits, str(dtype))
    for dim, groups in ((1, 1), (7, 1), (64, 1), (100, 5), (256, 8), (1000, 1), (1536, 12), (130, 130)):
        _, rows, scale = random_table(rng, 11, dim, bits, groups)
        for embed_scale in (1.0, math.sqrt(1536), 0.1, 1e-6):
            for ids in (torch.tensor([[10, 0, 3], [3, 3, 7]]), torch.tensor(4), torch.tensor([], dtype=torch.int64)):
                args = (rows, scale, bits, dim, embed_scale, dtype)
                expected = reference.embedding(ids, *args)
                assert same_bits(cpu.embedding(ids, *args, isa=isa), expected)
                assert same_bits(cpu.embedding(ids.to(torch.int32), *args, isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_scales_as_torch_does(isa, dtype):
    """Every code with many scales: rounding, subnormal and overflowing 16-bit values, and both roundings in a row."""
    codes = torch.arange(-128, 128).to(torch.int8).expand(400, 256).contiguous()
    scale = torch.from_numpy((2.0 ** np.linspace(-40, 13, 400)).astype(np.float32))[:, None]
    ids = torch.arange(400)
    for embed_scale in (39.191835884530846, 1.0000000001, 3.0, -0.37, 1e300):
        args = (ids, pack_rows(codes, 8), scale, 8, 256, embed_scale, dtype)
        made, expected = cpu.embedding(*args, isa=isa), reference.embedding(*args)
        assert torch.equal(made.isnan(), expected.isnan())
        assert same_bits(made.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
def test_embedding_of_ids_that_are_no_rows_raises(isa):
    _, rows, scale = random_table(generator(), 5, 64, 4)
    for dtype in (torch.int64, torch.int32):
        for wrong in (-1, 5, 2**31 - 1, -(2**31)):
            with pytest.raises(IndexError, match="5 rows"):
                cpu.embedding(torch.tensor([0, 1, wrong], dtype=dtype), rows, scale, 4, 64, 1.0, torch.float32, isa=isa)
    with pytest.raises(IndexError):
        torch.ops.bytelane.embedding(torch.tensor([5]), rows, scale, 4, 64, 1.0, torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_embedding_reads_only_its_rows(isa, bits, threads):
    """The last row ends at a page without access; the table may be cut out of a wider one; threads do not matter."""
    rng = generator(bits)
    dim = 301
    _, rows, scale = random_table(rng, 40, dim, bits)
    ids = torch.tensor([39, 0, 39])
    expected = reference.embedding(ids, rows, scale, bits, dim, 2.5, torch.bfloat16)
    guarded = GuardedPages(rows.numel()).at_end(rows)
    guarded_scale = GuardedPages(scale.numel() * 4).at_end(scale)
    assert same_bits(cpu.embedding(ids, guarded, guarded_scale, bits, dim, 2.5, torch.bfloat16, isa=isa), expected)
    wide = torch.full((40, rows.shape[1] + 9), 255, dtype=torch.uint8)
    wide[:, 4 : 4 + rows.shape[1]] = rows
    cut = wide[:, 4 : 4 + rows.shape[1]]
    assert same_bits(cpu.embedding(ids, cut, scale, bits, dim, 2.5, torch.bfloat16, isa=isa), expected)
    many = torch.from_numpy(rng.integers(0, 40, 3000))
    expected = reference.embedding(many, rows, scale, bits, dim, 2.5, torch.float16)
    for count in (1, 2, 3):
        threads(count)
        assert same_bits(cpu.embedding(many, rows, scale, bits, dim, 2.5, torch.float16, isa=isa), expected)


def test_wrong_embedding_calls_are_refused():
    _, rows, scale = random_table(generator(), 5, 64, 4)
    first = torch.tensor([0])

    def embedding(ids=first, rows=rows, scale=scale, bits=4, dim=64, dtype=torch.float32):
        return cpu.embedding(ids, rows, scale, bits, dim, 1.0, dtype, isa=ISAS[-1])

    assert embedding().shape == (1, 64)
    for wrong in (
        {"ids": torch.tensor([0.0])},
        {"ids": torch.tensor([0], dtype=torch.int16)},
        {"rows": rows[:4]},
        {"rows": rows.to(torch.int8)},
        {"rows": rows.t().contiguous().t()},
        {"scale": scale[:4]},
        {"scale": scale.double()},
        {"scale": scale.expand(5, 3)},
        {"scale": torch.ones(5, 0)},
        {"bits": 8},
        {"dim": 65},
        {"dtype": torch.float64},
    ):
        with pytest.raises(ValueError, match=r"must|need|do not divide"):
            embedding(**wrong)


# --- the weight-only layer -----------------------------------------------------------------------------------------


def random_layer(rng, m, n, k, bits, groups, dtype):
    _, rows, scale = random_table(rng, n, k, bits, groups)
    x = torch.from_numpy(rng.normal(0, 1, (m, k)).astype(np.float32)).to(dtype)
    return x, rows, scale * 0.05


def exact_and_bound(x, values, bias, dtype, fixed_point):
    """The exact sums, and how far from them the kernel may be.

    A product of two 16-bit floats is exact in float32. A lane adds ceil(K / 16) of them, the lanes take four more
    additions and the bias one: each term passes through at most d = ceil(K / 16) + 5 roundings of relative size
    u = 2^-24, which changes the sum by at most d u / (1 - d u) times the sum of the terms' sizes.

    In fixed point (2 bits, one scale per channel) every x is rounded to a multiple of 2^(e-22), where |x| < 2^e, and
    the sum of the products is exact; it is rounded to float32, and once more when the bias is added.

    The cast to T then adds half a last place: 2^-8 (bfloat16) or 2^-11 (float16) of the value, or half of the smallest
    subnormal.
    """
    x, values, bias = x.double(), values.double(), bias.to(dtype).double()
    total = x @ values.t() + bias
    sizes = x.abs() @ values.abs().t() + bias.abs()
    depth = 2 if fixed_point else -(-x.shape[1] // 16) + 5
    before = depth * 2.0**-24 / (1 - depth * 2.0**-24) * sizes
    if fixed_point and x.numel():
        step = 2.0 ** (torch.frexp(x.abs().amax(1, keepdim=True)).exponent.double() - 22)
        before = before * (1 + 2.0**-20) + step / 2 * values.abs().sum(1)
    place, smallest = {torch.bfloat16: (2.0**-8, 2.0**-134), torch.float16: (2.0**-11, 2.0**-25)}[dtype]
    return total, before + place * (total.abs() + before) + smallest


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weight_only_is_the_float64_sum(isa, bits, dtype):
    rng = generator(bits, str(dtype))
    for m, n, k, groups in (
        (1, 65, 1536, 1),
        (1, 1, 1, 1),
        (2, 5, 15, 1),
        (1, 66, 17, 1),
        (3, 7, 100, 5),
        (8, 67, 1000, 1),
        (1, 9, 1040, 13),
        (4, 0, 64, 1),
        (0, 4, 64, 1),
        (5, 130, 600, 60),
        (258, 3, 40, 1),
    ):
        x, rows, scale = random_layer(rng, m, n, k, bits, groups, dtype)
        bias = torch.from_numpy(rng.normal(0, 1, n).astype(np.float32))
        codes = torch.from_numpy(oracle.unpack_bits(rows, bits, k))
        values = numerics.dequantize_weight(codes, scale, dtype)
        for b in (torch.zeros(n), bias):
            y = cpu.linear_weight_only(x, rows, scale, None, b, bits, isa=isa)
            total, bound = exact_and_bound(x, values, b, dtype, bits == 2 and groups == 1)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            assert bool(((y.double() - total).abs() <= bound).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weight_only_of_small_integers_is_exact(isa, bits, dtype):
    """Where no rounding happens at all, every order gives torch's bits, output step included."""
    rng = generator(bits)
    for k, groups in ((96, 1), (33, 1), (96, 6)):
        codes, rows, _ = random_table(rng, 70, k, bits)
        scale = torch.from_numpy(2.0 ** rng.integers(-3, 2, (70, groups)).astype(np.float32))
        x = torch.from_numpy(rng.integers(-3, 4, (3, k)).astype(np.float32) * 0.5).to(dtype)
        bias = torch.from_numpy(rng.integers(-8, 9, 70).astype(np.float32))
        for b in (None, bias):
            for output_scale in (None, torch.tensor(0.5), torch.tensor([0.037])):
                y = cpu.linear_weight_only(x, rows, scale, output_scale, b, bits, isa=isa)
                exact = x.double() @ numerics.dequantize_weight(codes, scale, torch.float64).t()
                expected = (exact if b is None else exact + b.double()).to(dtype)
                if output_scale is not None:
                    expected = numerics.fake_quantize(expected, output_scale)
                assert torch.equal(y, expected)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weight_only_bits_depend_on_nothing_but_the_layer(bits, groups, dtype, threads):
    """Threads, M, the place of a row in the matrix, and the instruction set."""
    rng = generator(bits, groups)
    x, rows, scale = random_layer(rng, 11, 203, 1000, bits, groups, dtype)
    s_out, bias = torch.tensor(0.07), torch.linspace(-1, 1, 203)
    threads(1)
    whole = cpu.linear_weight_only(x, rows, scale, s_out, bias, bits, isa=ISAS[-1])
    for isa in ISAS:
        for count in (1, 2, 3):
            threads(count)
            for m in (1, 2, 7, 11):
                assert same_bits(cpu.linear_weight_only(x[:m], rows, scale, s_out, bias, bits, isa=isa), whole[:m])
        part = cpu.linear_weight_only(x[10], rows[50:101], scale[50:101], s_out, bias[50:101], bits, isa=isa)
        assert same_bits(part, whole[10, 50:101])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weight_only_of_two_bits_is_the_exact_sum(isa, dtype):
    """Activations within 2^-11 of the largest lose nothing: the result is the exact sum, rounded to float32 first."""
    rng = generator()
    codes, rows, scale = random_table(rng, 70, 3000, 2)
    x = torch.from_numpy(rng.choice([-1, 1], (4, 3000)) * 2.0 ** rng.uniform(-10, 0, (4, 3000))).to(dtype)
    for spread in (1.0, 2.0**-8, 2.0**4):
        y = cpu.linear_weight_only(x * spread, rows, scale, None, None, 2, isa=isa)
        exact = (x * spread).double() @ numerics.dequantize_weight(codes, scale.to(dtype).double(), torch.float64).t()
        assert same_bits(y, exact.to(torch.float32).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_only_of_odd_values(isa, dtype, bits):
    rng = generator()
    _, rows, scale = random_table(rng, 20, 96, bits)
    x = torch.ones(5, 96, dtype=dtype)
    x[1, 3], x[2, 90], x[3] = torch.nan, torch.inf, 0
    scale[7] = 0
    for output_scale in (None, torch.tensor(0.25)):
        y = cpu.linear_weight_only(x, rows, scale, output_scale, None, bits, isa=isa)
        expected = reference.linear_weight_only(x, rows, scale, output_scale, None, bits)
        assert bool(y[1].isnan().all())
        assert torch.equal(y[2].isnan(), expected[2].isnan())
        assert torch.equal(y[2].nan_to_num(), expected[2].nan_to_num())
        assert not y[3].any()
        assert not y[[0, 3, 4], 7].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_weight_only_reads_nothing_past_the_last_byte(isa, bits):
    rng = generator(bits)
    for n, k in ((1, 1), (5, 3), (3, 33), (4, 63), (1, 100), (7, 577)):
        for m in (1, 3):
            x, rows, scale = random_layer(rng, m, n, k, bits, 1, torch.bfloat16)
            bias = torch.zeros(n)
            plain = cpu.linear_weight_only(x, rows, scale, None, bias, bits, isa=isa)
            pages = [GuardedPages(t.numel() * t.element_size()) for t in (x, rows, scale, bias)]
            guarded = [p.at_end(t) for p, t in zip(pages, (x, rows, scale, bias), strict=True)]
            again = cpu.linear_weight_only(*guarded[:3], None, guarded[3], bits, isa=isa)
            assert same_bits(again, plain)


def test_wrong_weight_only_calls_are_refused():
    x, rows, scale = random_layer(generator(), 2, 5, 64, 4, 1, torch.bfloat16)

    def linear(x=x, rows=rows, scale=scale, s_out=None, bias=None, bits=4):
        return cpu.linear_weight_only(x, rows, scale, s_out, bias, bits, isa=ISAS[-1])

    assert linear().shape == (2, 5)
    for wrong in (
        {"x": x.float()},
        {"x": x.double()},
        {"x": x[:, :62]},
        {"rows": rows[:4]},
        {"scale": scale.double()},
        {"scale": torch.ones(5, 3)},
        {"s_out": torch.ones(5)},
        {"bias": torch.ones(4)},
        {"bits": 8},
    ):
        with pytest.raises(ValueError, match=r"must|do not divide"):
            linear(**wrong)
