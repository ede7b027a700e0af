"""The native CPU kernels against the NumPy oracle: equal, never close, for every instruction set this machine runs."""

import ctypes
import mmap
import zlib

import numpy as np
import pytest
import torch

import oracle
from bytelane import numerics
from bytelane.kernels import cpu
from bytelane.packing import pack_rows

ISAS = cpu.supported_isas()
ALL_BITS = tuple(range(2, 9))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = [
    pytest.param(isa, path, bits, id=f"{isa}-{path}-{bits}")
    for isa in ISAS
    for path in cpu.PATHS
    for bits in (cpu.PACKED_BITS if path == "packed" else ALL_BITS)
]


def generator(*key):
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def random_codes(rng, bits, *shape):
    return rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int8)


def rows_of(codes, bits):
    return pack_rows(torch.from_numpy(codes), bits)


def random_layer(rng, n, k, bits, group_size=0):
    groups = k // group_size if group_size else 1
    codes = random_codes(rng, bits, n, k)
    weight_scale = rng.uniform(1e-4, 0.02, (n, groups)).astype(np.float32)
    input_scale, output_scale = (np.float32(rng.uniform(0.01, 0.1)) for _ in range(2))
    bias = rng.normal(0, 1, n).astype(np.float32)
    return codes, weight_scale, input_scale, output_scale, bias


def tensor(value):
    return None if value is None else torch.from_numpy(np.asarray(value))


def check_accumulate(isa, path, bits, q, codes, group_size=0):
    acc = cpu.accumulate(torch.from_numpy(q), rows_of(codes, bits), bits, group_size, isa=isa, path=path)
    expected = oracle.accumulate(q, codes, group_size)
    assert acc.shape == expected.shape
    assert np.array_equal(acc.numpy(), expected)


def check_linear(isa, path, bits, x, codes, weight_scale, input_scale, output_scale, bias, group_size=0):
    args = (tensor(weight_scale), tensor(input_scale), tensor(output_scale), tensor(bias))
    y = cpu.linear(x, rows_of(codes, bits), *args, bits, group_size, isa=isa, path=path)
    floats = x.to(torch.float32).numpy()
    expected = oracle.linear(floats, codes, weight_scale, input_scale, output_scale, bias, group_size)
    assert y.dtype == x.dtype
    assert torch.equal(y, torch.from_numpy(expected).to(x.dtype))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- accumulators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 31, 33, 63, 64, 65, 100, 127, 129, 255, 257, 576, 1536])
def test_accumulators_of_ragged_shapes(isa, path, bits, k):
    rng = generator(bits, k)
    for m, n in ((0, 5), (1, 1), (1, 17), (2, 5), (3, 17), (5, 1), (17, 5)):
        check_accumulate(isa, path, bits, random_codes(rng, 8, m, k), random_codes(rng, bits, n, k))


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_accumulators_of_long_rows(isa, path, bits):
    rng = generator(bits)
    for m, n, k in ((64, 17, 1536), (3, 70, 6144), (2, 3, 131072), (1, 0, 64), (7, 1030, 130), (35, 9, 12300)):
        check_accumulate(isa, path, bits, random_codes(rng, 8, m, k), random_codes(rng, bits, n, k))


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_accumulators_of_extreme_codes(isa, path, bits):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for k in (1, 33, 100, 6144, 131071):
        for w in (low, high):
            for a in (-128, 127):
                check_accumulate(isa, path, bits, np.full((3, k), a, np.int8), np.full((5, k), w, np.int8))
    signs = np.where(np.arange(577) % 2, 127, -128).astype(np.int8)
    weights = np.where(np.arange(577) % 3, high, low).astype(np.int8)
    check_accumulate(isa, path, bits, np.stack([signs, -1 - signs]), np.stack([weights, weights[::-1]]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(
    ("k", "group_size"), [(1, 1), (96, 3), (96, 32), (24, 1), (65, 13), (576, 576), (1536, 128), (2600, 8), (300, 100)]
)
def test_accumulators_of_groups(isa, bits, k, group_size):
    rng = generator(bits, k, group_size)
    for m, n in ((0, 3), (1, 17), (2, 1), (5, 66)):
        check_accumulate(isa, "unpacked", bits, random_codes(rng, 8, m, k), random_codes(rng, bits, n, k), group_size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", cpu.PACKED_BITS)
def test_accumulators_of_packed_groups(isa, bits):
    """Whole vectors and parts of one; rows that end within a vector, and among those folded together."""
    rng = generator(bits)
    for group_bits in (*sorted(cpu.PART_BITS), *(units * cpu.GROUP_BITS for units in (1, 2, 3, 5))):
        size = group_bits // bits
        for m, n, groups in (
            (0, 3, 2),
            (1, 1, 1),
            (1, 66, 3),
            (2, 5, 2),
            (5, 7, 5),
            (3, 130, 1),
            (4, 9, 9),
            (7, 2, 18),
        ):
            k = size * groups
            check_accumulate(isa, "packed", bits, random_codes(rng, 8, m, k), random_codes(rng, bits, n, k), size)
    for w in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
        for a in (-128, 127):
            size = min(cpu.PART_BITS) // bits
            q, codes = np.full((3, 40 * size), a, np.int8), np.full((5, 40 * size), w, np.int8)
            check_accumulate(isa, "packed", bits, q, codes, size)
            check_accumulate(isa, "packed", bits, q, codes, 40 * size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(2, 8))
def test_every_code_of_every_width_unpacks(isa, bits):
    """A one-hot row of activations reads one code: all of them, at every place of a row of several unpacking steps."""
    k = 137
    codes = random_codes(generator(bits), bits, 9, k)
    q = np.eye(k, dtype=np.int8)
    check_accumulate(isa, "unpacked", bits, q, codes)


@pytest.mark.parametrize("isa", ISAS)
def test_the_longest_extreme_row_wraps_to_the_same_bits(isa):
    """2^17 products of -128 and -128 are 2^31, one more than int32 holds: the only such sum, and it wraps."""
    q, codes = np.full((1, 131072), -128, np.int8), np.full((1, 131072), -128, np.int8)
    for path in cpu.PATHS:
        acc = cpu.accumulate(torch.from_numpy(q), rows_of(codes, 8), 8, isa=isa, path=path)
        assert acc.item() == -(2**31)


# --- the whole layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_every_form(isa, path, bits, dtype):
    rng = generator(bits, str(dtype))
    for group_size, k in ((0, 100), (256 // bits, 512 // bits) if path == "packed" else (20, 100)):
        for m, n in ((1, 65), (7, 18)):
            codes, weight_scale, s_in, s_out, bias = random_layer(rng, n, k, bits, group_size)
            x = torch.from_numpy(rng.normal(0, 2, (m, k)).astype(np.float32)).to(dtype)
            for output_scale in (s_out, None):
                for b in (bias, None):
                    check_linear(isa, path, bits, x, codes, weight_scale, s_in, output_scale, b, group_size)


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_one_input_are_the_same_bits_in_one_call(isa, path, bits, dtype):
    """Rows concatenated, one output scale per channel: every part equals the part alone, and the oracle."""
    rng = generator(bits, str(dtype))
    size = 512 // bits if path == "packed" else 32
    for group_size in (0, size):
        k, s_in = 2 * size, np.float32(0.04)
        parts = [random_layer(rng, n, k, bits, group_size) for n in (70, 1, 33)]
        x = torch.from_numpy(rng.normal(0, 2, (5, k)).astype(np.float32)).to(dtype)
        codes, weight_scale, bias = (np.concatenate([part[i] for part in parts]) for i in (0, 1, 4))
        output_scale = np.concatenate([np.full(len(part[0]), part[3]) for part in parts])
        for b in (bias, None):
            args = (tensor(weight_scale), tensor(s_in), tensor(output_scale), tensor(b), bits, group_size)
            for m in (1, 5):
                merged = cpu.linear(x[:m], rows_of(codes, bits), *args, isa=isa, path=path)
                apart = [
                    cpu.linear(
                        x[:m],
                        rows_of(part[0], bits),
                        tensor(part[1]),
                        tensor(s_in),
                        tensor(part[3]),
                        None if b is None else tensor(part[4]),
                        bits,
                        group_size,
                        isa=isa,
                        path=path,
                    )
                    for part in parts
                ]
                assert torch.equal(merged, torch.cat(apart, 1))
            acc = torch.from_numpy(oracle.accumulate(oracle.quantize(x.float().numpy(), s_in), codes, group_size))
            acc = acc.to(torch.int32)
            finished = cpu.requantize(acc, *args[:4], dtype, isa=isa)
            assert torch.equal(finished, merged)
            assert torch.equal(finished, numerics.requantize(acc, *args[:4], dtype))


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_linear_of_odd_inputs(isa, path, bits):
    rng = generator(bits)
    codes, weight_scale, s_in, s_out, bias = random_layer(rng, 20, 96, bits)
    x = torch.from_numpy(rng.normal(0, 2, (6, 96)).astype(np.float32))
    x[0, :9] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38])
    x[1] = torch.nan
    x[2] = -torch.inf
    x[3] = 0
    x[4] = (torch.arange(96) - 48.5) * float(s_in)
    for dtype in DTYPES:
        check_linear(isa, path, bits, x.to(dtype), codes, weight_scale, s_in, s_out, bias)
        check_linear(isa, path, bits, x.to(dtype), codes, weight_scale, s_in, None, None)


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_outputs_on_half_steps_round_to_even(isa, path, bits):
    """Scales of powers of two put every other output exactly on a half step, and many beyond the int8 range."""
    rng = generator(bits)
    codes = random_codes(rng, bits, 33, 100)
    x = torch.from_numpy((rng.integers(-40, 40, (4, 100)) / 2).astype(np.float32))
    scales = np.full((33, 1), 2.0**-bits, np.float32), np.float32(1), np.float32(2)
    for dtype in DTYPES:
        check_linear(isa, path, bits, x.to(dtype), codes, *scales, np.linspace(-3, 3, 33, dtype=np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("path", "bits", "group_size"),
    [("packed", 4, 0), ("packed", 8, 0), ("packed", 4, 64), ("packed", 2, 64), ("unpacked", 3, 64)],
)
def test_bits_do_not_depend_on_threads_or_batch(isa, path, bits, group_size, threads):
    rng = generator(bits)
    n, k = 301, 576
    codes, weight_scale, s_in, s_out, bias = random_layer(rng, n, k, bits, group_size)
    x = torch.from_numpy(rng.normal(0, 2, (300, k)).astype(np.float32)).to(torch.bfloat16)
    rows = rows_of(codes, bits)
    args = (rows, tensor(weight_scale), tensor(s_in), tensor(s_out), tensor(bias), bits, group_size)
    expected = oracle.linear(x[:64].float().numpy(), codes, weight_scale, s_in, s_out, bias, group_size)
    threads(1)
    whole = cpu.linear(x, *args, isa=isa, path=path)
    assert torch.equal(whole[:64], torch.from_numpy(expected).to(torch.bfloat16))
    for count in (1, 2, 3, 4, 7):
        threads(count)
        for m in (1, 2, 3, 5, 17, 64, 300):
            assert torch.equal(cpu.linear(x[:m], *args, isa=isa, path=path), whole[:m])
        assert torch.equal(cpu.linear(x[299:], *args, isa=isa, path=path), whole[299:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_number_of_rows(isa, bits):
    """Tiles of every height, evenly dealt out, and the loops on both sides of where one takes over from another."""
    rng = generator(bits)
    k, n = 200, 11
    codes, q = random_codes(rng, bits, n, k), random_codes(rng, 8, 66, k)
    for m in (*range(1, 27), 48, 49, 64, 65):
        for path in ("packed", "unpacked") if bits in cpu.PACKED_BITS else ("unpacked",):
            check_accumulate(isa, path, bits, q[:m], codes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", cpu.PACKED_BITS)
def test_sums_of_long_rows_of_extreme_codes(isa, bits):
    """More activations of -128 than 16 bits hold the sum of, and a number that is no whole vector."""
    codes = np.full((5, 12301), -(1 << (bits - 1)), np.int8)
    for value in (-128, 127):
        for m in (1, 2, 6, 70):
            check_accumulate(isa, "packed", bits, np.full((m, 12301), value, np.int8), codes)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_beyond_one_block_of_activations(isa):
    rng = generator()
    for bits, path in ((8, "packed"), (2, "packed"), (5, "unpacked")):
        codes = random_codes(rng, bits, 3, 6144)
        check_accumulate(isa, path, bits, random_codes(rng, 8, 181, 6144), codes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), [(270, 1029, 4000), (100, 580, 12300)])
def test_more_activations_than_stay_beside_a_panel(isa, m, n, k, threads):
    """Tile registers then take panels side by side, the last of them alone; whole rows, and parts of k."""
    rng = generator(m)
    x = torch.from_numpy(rng.normal(0, 2, (m, k)).astype(np.float32)).to(torch.bfloat16)
    for count in (1, 2):
        threads(count)
        check_linear(isa, "packed", 4, x, *random_layer(rng, n, k, 4))


@pytest.mark.parametrize("isa", ISAS)
def test_shapes_and_strides_of_activations(isa):
    rng = generator()
    codes, weight_scale, s_in, s_out, _ = random_layer(rng, 9, 48, 4)
    x = torch.from_numpy(rng.normal(0, 1, (2, 3, 96)).astype(np.float32))[..., ::2]
    check_linear(isa, "packed", 4, x, codes, weight_scale, s_in, s_out, None)
    check_linear(isa, "packed", 4, x[:0], codes, weight_scale, s_in, s_out, None)
    check_linear(isa, "packed", 4, x[0, 0], codes, weight_scale, s_in, s_out, None)
    check_linear(isa, "unpacked", 4, x.transpose(0, 1), codes, weight_scale, s_in.reshape(1), s_out.reshape(1), None)


# --- quantize and requantize -------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1.0, 0.037, 1e-30, 3e30])
def test_quantize_all_16_bit_floats(isa, scale):
    """Every bfloat16 and every float16, NaNs, infinities and subnormals among them."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = patterns.view(dtype)
        q = cpu.quantize(x, torch.tensor(scale), isa=isa)
        assert np.array_equal(q.numpy(), oracle.quantize(x.float().numpy(), np.float32(scale)))


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_of_every_length_and_of_half_steps(isa):
    rng = generator()
    for count in (0, 1, 2, 63, 64, 65, 129, 16385, 100001):
        x = rng.normal(0, 3, count).astype(np.float32)
        q = cpu.quantize(torch.from_numpy(x), torch.tensor([0.04]), isa=isa)
        assert np.array_equal(q.numpy(), oracle.quantize(x, np.float32(0.04)))
    halves = np.arange(-300, 300, dtype=np.float32) / 2
    near = np.concatenate([halves, np.nextafter(halves, np.float32(1e9)), np.nextafter(halves, np.float32(-1e9))])
    for scale in (1.0, 0.5, 0.1):
        x = (near * np.float32(scale)).reshape(6, -1)
        q = cpu.quantize(torch.from_numpy(x), torch.tensor(scale), isa=isa)
        assert np.array_equal(q.numpy(), oracle.quantize(x, np.float32(scale)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_requantize_of_any_accumulator(isa, dtype, groups):
    rng = generator(groups)
    for m, n in ((0, 3), (1, 1), (5, 63), (2, 65), (70, 260)):
        spread = 2.0 ** rng.integers(0, 32, (m, n, groups))
        acc = np.clip(rng.normal(0, 1, (m, n, groups)) * spread, -(2**31), 2**31 - 2**20).astype(np.int32)
        weight_scale = (2.0 ** rng.uniform(-30, 2, (n, groups))).astype(np.float32)
        bias = rng.normal(0, 1, n).astype(np.float32) * weight_scale[:, 0] * 1000
        for output_scale in (np.float32(0.07), None):
            for b in (bias, None):
                y = cpu.requantize(
                    torch.from_numpy(acc),
                    torch.from_numpy(weight_scale),
                    torch.tensor(0.03),
                    tensor(output_scale),
                    tensor(b),
                    dtype,
                    isa=isa,
                )
                expected = oracle.requantize(acc, weight_scale, np.float32(0.03), output_scale, b)
                assert torch.equal(y, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
def test_casts_to_16_bits_round_half_to_even(isa):
    """Unit scales make the output the accumulator itself: large, tied and overflowing values; 2^-24: subnormals."""
    acc = np.concatenate([np.arange(-70000, 70000, 7), np.arange(1 << 24, (1 << 24) + 3000), [2**31 - 1, -(2**31)]])
    acc = torch.from_numpy(acc.astype(np.int32)).reshape(1, -1, 1)
    for scale in (1.0, 2.0**-24, 2.0**-26):
        weight_scale = torch.full((acc.shape[1], 1), scale)
        expected = acc[..., 0].to(torch.float32) * scale
        for dtype in DTYPES:
            y = cpu.requantize(acc, weight_scale, torch.tensor(1.0), None, None, dtype, isa=isa)
            assert torch.equal(y, expected.to(dtype))


# --- memory ------------------------------------------------------------------------------------------------------


class GuardedPages:
    """Memory that ends where a page without access begins: one byte too far is a fault."""

    def __init__(self, size):
        self.usable = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(-1, self.usable + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert mprotect(address + self.usable, mmap.PAGESIZE, 0) == 0

    def at_end(self, source):
        """A copy of a tensor whose last byte is the last byte before the guard."""
        size = source.numel() * source.element_size()
        copy = torch.frombuffer(self.map, dtype=torch.uint8, count=size, offset=self.usable - size)
        copy.copy_(source.contiguous().view(torch.uint8).reshape(-1))
        return copy.view(source.dtype).reshape(source.shape)


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_nothing_past_the_last_byte_is_read(isa, path, bits):
    rng = generator(bits)
    for n, k in ((1, 1), (5, 3), (3, 33), (4, 63), (1, 100), (7, 577), (2, 1537)):
        codes = random_codes(rng, bits, n, k)
        rows = rows_of(codes, bits)
        weight = GuardedPages(rows.numel()).at_end(rows)
        for m in (1, 2, 5):
            q = torch.from_numpy(random_codes(rng, 8, m, k))
            guarded = GuardedPages(q.numel()).at_end(q)
            acc = cpu.accumulate(guarded, weight, bits, isa=isa, path=path)
            assert np.array_equal(acc.numpy(), oracle.accumulate(q.numpy(), codes))
        x = torch.from_numpy(rng.normal(0, 1, (3, k)).astype(np.float32)).to(torch.bfloat16)
        weight_scale = torch.from_numpy(rng.uniform(1e-3, 1e-2, (n, 1)).astype(np.float32))
        scales = torch.tensor(0.02), torch.tensor(0.03), torch.zeros(n)
        plain = cpu.linear(x, rows, weight_scale, *scales, bits, isa=isa, path=path)
        pages = GuardedPages(x.numel() * 2), GuardedPages(n * 4)
        x, weight_scale = (page.at_end(value) for page, value in zip(pages, (x, weight_scale), strict=True))
        assert torch.equal(cpu.linear(x, weight, weight_scale, *scales, bits, isa=isa, path=path), plain)


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_nothing_past_the_last_byte_of_groups_is_read(isa, path, bits):
    rng = generator(bits)
    unit = min(cpu.PART_BITS) // bits
    for n, group_size, groups in ((1, unit, 3), (5, unit, 5), (3, 4 * unit, 2), (2, 5, 7), (3, 32, 3), (1, 64, 1)):
        group_bits = group_size * bits
        if path == "packed" and group_bits % cpu.GROUP_BITS and group_bits not in cpu.PART_BITS:
            continue
        codes = random_codes(rng, bits, n, group_size * groups)
        rows = rows_of(codes, bits)
        weight = GuardedPages(rows.numel()).at_end(rows)
        for m in (1, 3):
            q = random_codes(rng, 8, m, group_size * groups)
            acc = cpu.accumulate(torch.from_numpy(q), weight, bits, group_size, isa=isa, path=path)
            assert np.array_equal(acc.numpy(), oracle.accumulate(q, codes, group_size))


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_rows_at_any_byte(isa, path, bits):
    rng = generator(bits)
    codes, q = random_codes(rng, bits, 6, 300), random_codes(rng, 8, 5, 300)
    rows = rows_of(codes, bits)
    expected = oracle.accumulate(q, codes)
    for offset in (1, 3, 31):
        buffer = torch.full((rows.numel() + offset + 100,), 0xFF, dtype=torch.uint8)
        weight = buffer[offset : offset + rows.numel()].view(rows.shape)
        weight.copy_(rows)
        acc = cpu.accumulate(torch.from_numpy(q), weight, bits, isa=isa, path=path)
        assert np.array_equal(acc.numpy(), expected)


@pytest.mark.parametrize(("isa", "path", "bits"), KERNELS)
def test_bits_past_the_last_code_do_not_count(isa, path, bits):
    rng = generator(bits)
    for k in (1, 3, 5, 33):
        codes, q = random_codes(rng, bits, 4, k), random_codes(rng, 8, 2, k)
        rows = rows_of(codes, bits)
        rows[:, -1] |= (0xFF << ((k * bits - 1) % 8 + 1)) & 0xFF
        acc = cpu.accumulate(torch.from_numpy(q), rows, bits, isa=isa, path=path)
        assert np.array_equal(acc.numpy(), oracle.accumulate(q, codes))


# --- refusals ----------------------------------------------------------------------------------------------------


def test_every_supported_isa_is_compiled_and_portable_is_always_there():
    assert set(ISAS) <= set(cpu.compiled_isas())
    assert cpu.compiled_isas()[-1] == ISAS[-1] == "portable"


def test_wrong_calls_are_refused():
    q, rows, scale = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(3, 32, dtype=torch.uint8), torch.tensor(0.1)
    weight_scale = torch.full((3, 1), 0.1)
    x, isa = q.float(), ISAS[-1]

    def accumulate(q=q, rows=rows, bits=4, group_size=0, isa=isa, path="packed"):
        return cpu.accumulate(q, rows, bits, group_size, isa=isa, path=path)

    def linear(weight_scale=weight_scale, s_in=scale, s_out=scale, bias=None, x=x):
        return cpu.linear(x, rows, weight_scale, s_in, s_out, bias, 4, isa=isa, path="packed")

    assert accumulate().shape == (2, 3, 1)
    assert linear().shape == (2, 3)
    wrong = [
        lambda: accumulate(rows=torch.zeros(3, 24, dtype=torch.uint8), bits=3),
        lambda: accumulate(group_size=8),
        lambda: accumulate(group_size=-1),
        lambda: accumulate(group_size=48, path="unpacked"),
        lambda: accumulate(bits=8),
        lambda: accumulate(rows=torch.zeros(3, 72, dtype=torch.uint8), bits=9, path="unpacked"),
        lambda: accumulate(rows=torch.zeros(3, 64, dtype=torch.uint8)[:, ::2]),
        lambda: accumulate(rows=rows.to(torch.int8)),
        lambda: accumulate(q=q.float()),
        lambda: accumulate(q=q[0]),
        lambda: accumulate(q=torch.zeros(1, 131073, dtype=torch.int8), rows=torch.zeros(1, 65537, dtype=torch.uint8)),
        lambda: accumulate(isa="sse9"),
        lambda: accumulate(path="other"),
        lambda: linear(weight_scale=weight_scale.double()),
        lambda: linear(weight_scale=weight_scale[:2]),
        lambda: linear(s_in=torch.tensor([0.1, 0.2])),
        lambda: linear(s_out=torch.tensor(0.1, dtype=torch.bfloat16)),
        lambda: linear(s_out=torch.full((2,), 0.1)),
        lambda: linear(s_out=torch.tensor(0.1).expand(3)),
        lambda: linear(bias=torch.zeros(4)),
        lambda: linear(x=q.double()),
        lambda: cpu.quantize(q, scale, isa=isa),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"must|divide|takes|at most"):
            call()
    for missing in set(cpu.compiled_isas()) - set(ISAS):
        with pytest.raises(ValueError, match="does not support"):
            accumulate(isa=missing)
