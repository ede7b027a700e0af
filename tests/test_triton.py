"""The Triton kernels against the NumPy oracle: equal, never close.

They run on a GPU where there is one. Elsewhere `test_in_the_interpreter` runs this file once more in a process of its
own, in Triton's interpreter (the variable is read when Triton is imported), on small shapes.
"""

import copy
import dataclasses
import functools
import zlib

import numpy as np
import pytest
import torch

import float_oracle
import oracle
import tiny
from bytelane import numerics
from bytelane.packing import pack_rows
from interpreted import DEVICE, GPU, INTERPRETED, elsewhere, kernels, run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

from bytelane.decoder.norms import install_norms, norm_form
from bytelane.decoder.parts import norm_part
from bytelane.kernels import cpu, cuda, cuda_norm, float_ops
from bytelane.kernels.triton_configs import TABLE, CodesTile, DecodeTile, FusedTile

ALL_BITS = tuple(range(2, 9))
PATHS = {"fused": functools.partial(cuda.linear, launches=1), "codes": functools.partial(cuda.linear, launches=2)}


@elsewhere
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def generator(*key):
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def random_codes(rng, bits, *shape):
    return rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int8)


def tensor(value):
    return None if value is None else torch.from_numpy(np.asarray(value)).to(DEVICE)


def rows_of(codes, bits):
    return pack_rows(torch.from_numpy(codes), bits).to(DEVICE)


def random_layer(rng, n, k, bits, group_size=0):
    groups = k // group_size if group_size else 1
    codes = random_codes(rng, bits, n, k)
    weight_scale = rng.uniform(1e-4, 0.02, (n, groups)).astype(np.float32)
    input_scale, output_scale = (np.float32(rng.uniform(0.01, 0.1)) for _ in range(2))
    bias = rng.normal(0, 1, n).astype(np.float32)
    return codes, weight_scale, input_scale, output_scale, bias


def activations(rng, m, k, dtype=torch.bfloat16):
    x = rng.normal(0, 2, (m, k)).astype(np.float32)
    x[rng.random(x.shape) < 0.02] = 1e5
    return torch.from_numpy(x).to(dtype)


def check_linear(function, bits, x, codes, weight_scale, s_in, s_out, bias, group_size=0, **options):
    args = (tensor(weight_scale), tensor(s_in), tensor(s_out), tensor(bias))
    y = function(x.to(DEVICE), rows_of(codes, bits), *args, bits, group_size, **options)
    floats = x.to(torch.float32).numpy()
    expected = oracle.linear(floats, codes, weight_scale, s_in, s_out, bias, group_size)
    assert y.dtype == x.dtype
    assert torch.equal(y.cpu(), torch.from_numpy(expected).to(x.dtype))


@kernels
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("path", ["fused", "codes"])
def test_linear_of_ragged_shapes(bits, path):
    rng = generator(bits, path)
    function = PATHS[path]
    shapes = [(1, 17, 33), (3, 64, 256), (2, 5, 1), (9, 70, 130)]
    if path == "codes":
        shapes += [(17, 129, 96)]
    if GPU:
        shapes += [(16, 33, 100), (1, 64, 1024), (1, 1536, 6144), (16, 6144, 1536), (5, 1000, 777)]
        shapes += [] if path == "fused" else [(70, 66, 257), (300, 1000, 777), (257, 1536, 2048)]
    for m, n, k in shapes:
        layer = random_layer(rng, n, k, bits)
        check_linear(function, bits, activations(rng, m, k), *layer)


@kernels
@pytest.mark.parametrize("bits", (2, 5) if not GPU else (2, 4, 5, 8))
@pytest.mark.parametrize("path", ["fused", "codes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_with_sides_absent(bits, path, dtype):
    rng = generator(bits, path, str(dtype))
    function = PATHS[path]
    shapes = [(3, 37, 64, 0), (1, 5, 40, 8)] + ([(2, 37, 128, 32)] if GPU else [])
    for m, n, k, group_size in shapes:
        codes, weight_scale, s_in, s_out, bias = random_layer(rng, n, k, bits, group_size)
        x = activations(rng, m, k, dtype)
        for some_out in (None, s_out):
            for some_bias in (None, bias):
                check_linear(function, bits, x, codes, weight_scale, s_in, some_out, some_bias, group_size)


@kernels
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("path", ["fused", "codes"])
def test_linear_of_groups(bits, path):
    rng = generator(bits, path)
    function = PATHS[path]
    for m, n, k, group_size in ((2, 33, 96, 32), (3, 64, 256, 128), (1, 20, 72, 24), (16, 7, 16, 8), (2, 9, 300, 300)):
        layer = random_layer(rng, n, k, bits, group_size)
        check_linear(function, bits, activations(rng, m, k), *layer, group_size)


@kernels
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_output_scale_for_each_channel(bits):
    rng = generator(bits)
    for function in PATHS.values():
        for group_size in (0, 32):
            codes, weight_scale, s_in, _, bias = random_layer(rng, 37, 64, bits, group_size)
            each = rng.uniform(0.01, 0.1, 37).astype(np.float32)
            x = activations(rng, 3, 64)
            args = (rows_of(codes, bits), tensor(weight_scale), tensor(s_in), tensor(each), tensor(bias))
            y = function(x.to(DEVICE), *args, bits, group_size)
            scales = (torch.from_numpy(v) for v in (weight_scale, np.asarray(s_in), each, bias))
            assert torch.equal(y.cpu(), numerics.linear_integer(x, torch.from_numpy(codes), *scales, group_size))


@kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "tile",
    [
        FusedTile(16, 128, 4, 4, 3),
        FusedTile(32, 64, 2, 2, 2),
        FusedTile(64, 32, 1, 4, 4),
        CodesTile(64, 16, 32, 2, 4, 3),
        CodesTile(128, 32, 64, 3, 4, 2),
        CodesTile(64, 16, 32, 8, 4, 3, splits=3),
        CodesTile(32, 16, 32, 2, 4, 3, splits=3, wave=2),
    ],
)
def test_tiles_change_nothing(bits, tile):
    """Sharing K among programs, too: whichever comes last adds the same integers."""
    rng = generator(bits)
    for n, k in ((128, 512), (70, 300)):
        check_linear(cuda.linear, bits, activations(rng, 11, k), *random_layer(rng, n, k, bits), tile=tile)


@kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tile", [DecodeTile(4, 128, 4), DecodeTile(2, 64, 1), DecodeTile(16, 32, 2)])
def test_byte_dots(bits, tile):
    """Rows of one step and of several, of which the last may be short; channels that fill no tile; sides absent."""
    rng = generator(bits, tile.bn)
    shapes = [(1, 37, 128), (3, 16, 320), (4, 5, 1088 if bits == 2 else 544)]
    if GPU:
        shapes += [(1, 1536, 12288), (2, 700, 4096), (4, 256, 2560), (1, 8, 65536)]
    for m, n, k in shapes:
        codes, weight_scale, s_in, s_out, bias = random_layer(rng, n, k, bits)
        x = activations(rng, m, k)
        for some_out, some_bias in ((s_out, bias), (None, bias), (s_out, None)):
            check_linear(cuda.linear, bits, x, codes, weight_scale, s_in, some_out, some_bias, tile=tile)


SHIPPED = sorted(
    {
        (row.tile, bits)
        for row in TABLE["sm90"]
        for bits in ((row.bits,) if row.bits else (2, 4, 8))
        if GPU or isinstance(row.tile, DecodeTile)
    },
    key=repr,
)


@kernels
@pytest.mark.parametrize(("tile", "bits"), SHIPPED, ids=repr)
def test_every_tile_that_ships(tile, bits):
    """Of the table, as layers are given them: some share K. On layers that fill tiles, and that do not."""
    rng = generator(bits, repr(tile))
    if isinstance(tile, CodesTile) and tile.wave:
        tile = dataclasses.replace(tile, splits=2)  # without parts, `wave` would mean nothing
    m = 1 if isinstance(tile, DecodeTile) else 3
    for n, k in ((64, 1024), (37, 448)) if not GPU else ((512, 4096), (333, 1600)):
        check_linear(cuda.linear, bits, activations(rng, m, k), *random_layer(rng, n, k, bits), tile=tile)


@kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_byte_dots_of_extreme_codes_and_not_numbers(bits):
    k = 128 if not GPU else 65536
    x = torch.full((2, k), 1e9).bfloat16()
    x[1, ::3] = float("nan")  # 127 in integer numerics
    x[1, 1::3] = float("-inf")
    for w in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
        codes = np.full((6, k), w, np.int8)
        layer = (codes, np.full((6, 1), 0.01, np.float32), np.float32(0.5), np.float32(3e3))
        args = (tensor(layer[1]), tensor(layer[2]), tensor(layer[3]), None)
        y = cuda.linear(x.to(DEVICE), rows_of(codes, bits), *args, bits, tile=DecodeTile(4, 32, 2))
        scales = (torch.from_numpy(np.asarray(v)) for v in layer[1:])
        expected = numerics.linear_integer(x, torch.from_numpy(codes), *scales, None)
        assert torch.equal(y.cpu(), expected)


@kernels
def test_byte_dots_take_only_whole_words():
    """Rows of no whole 16 bytes, and rows that do not lie at 16 bytes, go to the other kernels by themselves."""
    rng = generator()
    layer = random_layer(rng, 9, 64, 4)
    x = activations(rng, 1, 64)
    args = [tensor(v) for v in layer[1:]]
    packed = rows_of(layer[0], 4)
    moved = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(packed.shape)
    y = cuda.linear(x.to(DEVICE), packed, *args, 4)
    assert torch.equal(cuda.linear(x.to(DEVICE), moved, *args, 4), y)
    with pytest.raises(ValueError, match="16 bytes"):
        cuda.linear(x.to(DEVICE), moved, *args, 4, tile=DecodeTile(4, 32, 4))
    for k in (65, 80):
        check_linear(cuda.linear, 4, activations(rng, 1, k), *random_layer(rng, 9, k, 4))


@kernels
@pytest.mark.parametrize("bits", ALL_BITS)
def test_accumulators_of_extreme_codes(bits):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for k in (33, 100) if not GPU else (33, 100, 6144, 131071, 131072):
        for w in (low, high):
            for a in (-128, 127):
                if k == 131072 and w == -128 and a == -128:
                    continue  # 2^31, one more than int32 holds
                q, codes = np.full((3, k), a, np.int8), np.full((5, k), w, np.int8)
                acc = cuda.accumulate(tensor(q), rows_of(codes, bits), bits)
                assert np.array_equal(acc.cpu().numpy(), oracle.accumulate(q, codes))


@kernels
@pytest.mark.parametrize("bits", ALL_BITS)
def test_accumulators_and_requantize(bits):
    rng = generator(bits)
    for m, n, k, group_size in ((3, 17, 64, 0), (2, 40, 96, 32), (18, 5, 33, 0)):
        codes, weight_scale, s_in, s_out, bias = random_layer(rng, n, k, bits, group_size)
        q = random_codes(rng, 8, m, k)
        acc = cuda.accumulate(tensor(q), rows_of(codes, bits), bits, group_size)
        assert np.array_equal(acc.cpu().numpy(), oracle.accumulate(q, codes, group_size))
        for some_out in (None, s_out):
            for some_bias in (None, bias):
                args = (tensor(weight_scale), tensor(s_in), tensor(some_out), tensor(some_bias))
                y = cuda.requantize(acc, *args, torch.float32)
                expected = oracle.requantize(acc.cpu().numpy(), weight_scale, s_in, some_out, some_bias)
                assert np.array_equal(y.cpu().numpy(), expected)


@kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_accumulators_of_programs_that_share_k(bits):
    rng = generator(bits)
    q, codes = random_codes(rng, 8, 5, 1000), random_codes(rng, bits, 70, 1000)
    acc = cuda.accumulate(tensor(q), rows_of(codes, bits), bits, tile=CodesTile(64, 16, 32, 8, 4, 2, splits=4))
    assert np.array_equal(acc.cpu().numpy(), oracle.accumulate(q, codes))


@kernels
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_linear_takes_any_number_of_rows(bits):
    rng = generator(bits)
    for m, n, k in (
        ((0, 8, 64), (1, 64, 128), (7, 32, 4608), (17, 64, 4608), (70, 5, 64)) if bits != 7 else ((17, 8, 64),)
    ):
        check_linear(cuda.linear, bits, activations(rng, m, k), *random_layer(rng, n, k, bits))


@kernels
def test_every_bfloat16_quantizes_right():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every if GPU else every[::7]
    for scale in (0.0371, 1.0, 3e-5):
        s = torch.tensor(scale)
        assert torch.equal(cuda.quantize(x.to(DEVICE), s.to(DEVICE)).cpu(), numerics.quantize(x, s))


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_halves_round_to_even(dtype):
    """Exact half steps on the way in and on the way out."""
    k = 64
    x = ((torch.arange(-300, 212, dtype=torch.float32) / 2).reshape(8, k)).to(dtype)
    codes = np.eye(16, k, dtype=np.int8)
    ones = np.ones((16, 1), np.float32)
    for function in PATHS.values():
        check_linear(function, 4, x, codes, ones, np.float32(1), np.float32(2), np.full(16, 0.5, np.float32))


@kernels
@pytest.mark.parametrize("bits", ALL_BITS)
def test_embedding(bits):
    rng = generator(bits)
    for rows, dim, group_size in ((11, 40, 0), (9, 64, 16), (5, 33, 0)):
        codes, weight_scale, *_ = random_layer(rng, rows, dim, bits, group_size)
        ids = torch.from_numpy(rng.integers(0, rows, (2, 7)))
        for dtype, index in ((torch.bfloat16, torch.int64), (torch.float32, torch.int32), (torch.float16, torch.int64)):
            args = (rows_of(codes, bits), tensor(weight_scale), bits, dim, 39.191835, dtype)
            y = cuda.embedding(ids.to(DEVICE, index), *args)
            taken = (torch.from_numpy(codes)[ids], torch.from_numpy(weight_scale)[ids])
            assert torch.equal(y.cpu(), numerics.embedding(*taken, 39.191835, dtype))


@kernels
def test_an_id_that_is_no_row_gives_nan():
    ids = torch.tensor([0, 3, -1], device=DEVICE)
    rows = torch.zeros(3, 4, dtype=torch.uint8, device=DEVICE)
    y = cuda.embedding(ids, rows, torch.ones(3, 1, device=DEVICE), 4, 8, 1.0, torch.bfloat16)
    assert torch.equal(y.isnan().any(1).cpu(), torch.tensor([False, True, True]))


@kernels
@pytest.mark.parametrize("bits", ALL_BITS)
def test_weight_only(bits):
    """Float sums in another order than torch's: the difference is bounded by what rounding K terms can do."""
    rng = generator(bits)
    for m, n, k, group_size in ((1, 70, 128, 0), (3, 33, 96, 32), (17, 64, 65, 0)):
        codes, weight_scale, _, _, bias = random_layer(rng, n, k, bits, group_size)
        x = torch.from_numpy(rng.normal(0, 1, (m, k)).astype(np.float32)).bfloat16()
        y = cuda.linear_weight_only(x.to(DEVICE), rows_of(codes, bits), tensor(weight_scale), None, tensor(bias), bits)
        weight = numerics.dequantize_weight(torch.from_numpy(codes), torch.from_numpy(weight_scale), torch.bfloat16)
        bias_t = torch.from_numpy(bias).bfloat16().double()
        exact = x.double() @ weight.double().T + bias_t
        magnitude = x.double().abs() @ weight.double().abs().T + bias_t.abs()
        # K float32 additions, then one rounding to bfloat16: half a step of 2^-7
        bound = magnitude * (k + 2) * 2.0**-24 + exact.abs() * 2.0**-8 * 1.001
        assert bool(((y.cpu().double() - exact).abs() <= bound).all())


@kernels
def test_weight_only_output_step():
    rng = generator()
    codes, weight_scale, _, s_out, _ = random_layer(rng, 48, 64, 4)
    x = torch.from_numpy(rng.normal(0, 1, (2, 64)).astype(np.float32)).bfloat16().to(DEVICE)
    args = (rows_of(codes, 4), tensor(weight_scale))
    plain = cuda.linear_weight_only(x, *args, None, None, 4)
    y = cuda.linear_weight_only(x, *args, tensor(s_out), None, 4)
    assert torch.equal(y, numerics.fake_quantize(plain, tensor(s_out)))


@kernels
def test_what_does_not_fit_is_refused():
    rng = generator()
    codes, weight_scale, s_in, s_out, _ = random_layer(rng, 8, 64, 4, 16)
    args = (tensor(weight_scale), tensor(s_in), tensor(s_out), None, 4)
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="whole number of bytes"):
        cuda.linear(x, rows_of(codes, 4), *args, 1)
    with pytest.raises(ValueError, match="weight rows"):
        cuda.linear(x, rows_of(codes, 4)[:, :-1], *args, 16)
    with pytest.raises(ValueError, match="up to 16 rows"):
        cuda.linear(x.expand(17, 64), rows_of(codes, 4), *args, 16, launches=1)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_bit_weight_only_is_the_cpu_kernel_bit_for_bit(dtype):
    rng = generator(str(dtype))
    isa = cpu.supported_isas()[0]
    shapes = [(1, 70, 128), (3, 64, 65), (5, 9, 300)] if not GPU else [(1, 4000, 1536), (17, 700, 1537), (40, 64, 640)]
    for m, n, k in shapes:
        codes, weight_scale, _, s_out, bias = random_layer(rng, n, k, 2)
        rows = pack_rows(torch.from_numpy(codes), 2)
        for magnitude in (1.0, 1e-6, 3e4):
            x = torch.from_numpy(rng.normal(0, magnitude, (m, k)).astype(np.float32)).to(dtype)
            x[0, : k // 2] = 0
            x[m - 1, 3] = float("nan" if magnitude == 1.0 else "inf") if m > 1 else 1.0
            for some_out, some_bias in ((None, None), (s_out, bias)):
                sides = [None if v is None else torch.from_numpy(np.asarray(v)) for v in (some_out, some_bias)]
                expected = cpu.linear_weight_only(x, rows, torch.from_numpy(weight_scale), *sides, 2, isa=isa)
                on_device = [None if v is None else v.to(DEVICE) for v in sides]
                y = cuda.linear_weight_only(x.to(DEVICE), rows.to(DEVICE), tensor(weight_scale), *on_device, 2)
                assert torch.equal(y.cpu().nan_to_num(7e4), expected.nan_to_num(7e4))


@kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("in_t", [False, True])
def test_norms_are_the_cpus(dtype, in_t):
    rng = generator(dtype, in_t)
    isa = cpu.supported_isas()[0]
    for m, width in ((1, 1), (3, 64), (2, 300)) if not GPU else ((1, 1), (7, 1536), (200, 256), (3, 5000)):
        x = torch.from_numpy(rng.normal(0, 3, (m, width)).astype(np.float32)).to(getattr(torch, dtype))
        x[0, 0] = 1000.0
        weight = torch.from_numpy(rng.normal(1, 0.3, width).astype(np.float32)).to(x.dtype)
        for plus_one in (False, True) if not in_t else (False,):
            w = weight.float() + 1.0 if plus_one else weight.float()
            form = cuda_norm.NormForm(1e-6, in_t, plus_one)
            y = cuda_norm.norm(x.to(DEVICE), weight.to(DEVICE), form).cpu()
            expected = float_oracle.norm(x.float().numpy(), w.numpy(), 1e-6, in_t, dtype)
            assert np.array_equal(y.float().numpy(), expected)
            assert torch.equal(y, float_ops.norm_rows(x, float_ops.Norm(w, 1e-6, in_t), isa=isa))
        y = cuda_norm.norm(x.to(DEVICE), None, cuda_norm.NormForm(1e-6)).cpu()
        assert np.array_equal(y.float().numpy(), float_oracle.norm(x.float().numpy(), None, 1e-6, False, dtype))


@kernels
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gemma4"])
def test_norms_of_models_are_the_cpus(architecture):
    """Each module's own order of roundings, as `decoder.norms` reads it off."""
    model = tiny.float_model(tiny.config(architecture)).to(torch.bfloat16)
    isa = cpu.supported_isas()[0]
    parts = [part for module in model.modules() if (part := norm_part(module)) is not None]
    assert len(parts) >= 5
    for part in parts:
        weight = getattr(part.module, "weight", None)
        width = 64 if weight is None else weight.numel()
        if weight is not None:
            weight.data = torch.linspace(-0.5, 1.5, width).to(torch.bfloat16)
        x = torch.linspace(-3, 5, 2 * width).reshape(2, width).to(torch.bfloat16)
        on_device = None if weight is None else weight.detach().to(DEVICE)
        y = cuda_norm.norm(x.to(DEVICE), on_device, norm_form(part)).cpu()
        assert torch.equal(y, float_ops.norm_rows(x, part.norm(), isa=isa))


@pytest.mark.skipif(not GPU or INTERPRETED, reason="needs a GPU")
def test_a_model_on_a_gpu_has_them():
    model = tiny.float_model(tiny.config("gemma4")).to("cuda", torch.bfloat16)
    assert install_norms(model) >= 10
    isa = cpu.supported_isas()[0]
    x = torch.linspace(-3, 5, 128).reshape(2, 64).to(torch.bfloat16)
    with torch.inference_mode():
        y = model.model.norm(x.cuda()).cpu()
    reference = norm_part(copy.deepcopy(model.model.norm).cpu())
    assert torch.equal(y, float_ops.norm_rows(x, reference.norm(), isa=isa))


def test_a_model_on_the_cpu_keeps_its_norms():
    model = tiny.float_model(tiny.config("llama"))
    assert install_norms(model) == 0
    assert not any(hasattr(module, "bytelane_norm") for module in model.modules())


@kernels
def test_norms_refuse_what_does_not_fit():
    x = torch.zeros(1, 8, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="multiplies in"):
        cuda_norm.norm(x, torch.ones(8, device=DEVICE), cuda_norm.NormForm(1e-6, True))
    with pytest.raises(ValueError, match="weight must be 8"):
        cuda_norm.norm(x, torch.ones(9, device=DEVICE), cuda_norm.NormForm(1e-6))
    with pytest.raises(ValueError, match="16384"):
        cuda_norm.norm(x.new_zeros(1, 20000), None, cuda_norm.NormForm(1e-6))
