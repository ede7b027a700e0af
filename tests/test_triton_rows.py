"""`rows_linear` against the NumPy oracle: on a GPU, or, its functions in Python, on torch tensors (gluon_torch.py).

It is written in Gluon, which has no interpreter. Without a GPU test_triton_launch.py compiles it.
"""

from typing import Any

import numpy as np
import pytest
import torch

import gluon_torch
from bytelane import numerics
from gluon_torch import Values
from interpreted import DEVICE, GPU, INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

from bytelane.kernels import cuda
from bytelane.kernels.triton_configs import TABLE, RowsTile, linear_tile, straight
from bytelane.kernels.triton_launch import Launch
from bytelane.kernels.triton_rows import rows_linear
from test_triton import activations, check_linear, generator, random_layer, rows_of, tensor

on_a_gpu = pytest.mark.skipif(not GPU or INTERPRETED, reason="needs a GPU: Gluon has no interpreter")

TILES = {
    "one launch": RowsTile(64, 4, 3),
    "asked for": RowsTile(128, 8, 2, ask=True),
    "two row tiles": RowsTile(128, 4, 2, early=False),
    "two warps": RowsTile(32, 2, 4),
    "parts of K": RowsTile(64, 4, 2, splits=3, ask=True),
    "late, parts of K": RowsTile(64, 4, 8, splits=2, early=False),
}


def check_sides(rng, bits, tile, x, n):
    """A random layer of `n` channels with each side present or absent."""
    codes, weight_scale, s_in, s_out, bias = random_layer(rng, n, x.shape[-1], bits)
    each = rng.uniform(0.01, 0.1, n).astype(np.float32)
    args = (rows_of(codes, bits), tensor(weight_scale), tensor(s_in))
    for some_out in (s_out, each, None):
        for some_bias in (None, bias):
            y = cuda.linear(x.to(DEVICE), *args, tensor(some_out), tensor(some_bias), bits, tile=tile)
            scales = (None if v is None else torch.from_numpy(np.asarray(v)) for v in (weight_scale, s_in, some_out))
            some_bias = None if some_bias is None else torch.from_numpy(some_bias)
            assert torch.equal(y.cpu(), numerics.linear_integer(x, torch.from_numpy(codes), *scales, some_bias))


@on_a_gpu
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", TILES)
def test_ragged_shapes(bits, name):
    """Channels that fill no tile, rows that fill no chunk, fewer chunks than parts, any number of activations."""
    rng = generator(bits, name)
    shapes = [(1, 37, 64), (3, 333, 1600), (16, 64, 2048), (9, 1000, 448), (8, 128, 3072), (13, 700, 2560), (2, 1, 128)]
    for m, n, k in shapes:
        check_linear(cuda.linear, bits, activations(rng, m, k), *random_layer(rng, n, k, bits), tile=TILES[name])


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sides_absent(bits, dtype):
    rng = generator(bits, str(dtype))
    for tile in (TILES["one launch"], TILES["parts of K"]):
        check_sides(rng, bits, tile, activations(rng, 16, 1088, dtype), 77)


@on_a_gpu
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("splits", [1, 4])
def test_extreme_codes_and_not_numbers(bits, splits):
    k = 4096
    x = torch.full((6, k), 1e9).bfloat16()
    x[1, ::3] = float("nan")  # 127 in integer numerics
    x[1, 1::3] = float("-inf")
    x[2] = float("inf")
    x[3] = -3e38
    for w in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
        codes = np.full((70, k), w, np.int8)
        layer = (np.full((70, 1), 0.01, np.float32), np.float32(0.5), np.float32(3e3))
        tile = RowsTile(64, 4, 3, splits)
        y = cuda.linear(x.to(DEVICE), rows_of(codes, bits), *map(tensor, layer), None, bits, tile=tile)
        scales = (torch.from_numpy(np.asarray(v)) for v in layer)
        assert torch.equal(y.cpu(), numerics.linear_integer(x, torch.from_numpy(codes), *scales, None))


@on_a_gpu
def test_every_bfloat16_quantizes_right():
    """Against codes of the identity: what comes out is what each activation was quantized to."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    k = 256
    identity = rows_of(np.eye(k, dtype=np.int8), 8)
    ones = torch.ones(k, 1, device=DEVICE)
    for scale in (0.0371, 1.0, 3e-5, 0.498):
        s = torch.tensor(scale)
        for x in every.view(-1, 16, k):
            y = cuda.linear(x.to(DEVICE), identity, ones, s.to(DEVICE), None, None, 8, tile=RowsTile(64, 4, 2))
            assert torch.equal(y.cpu(), (numerics.quantize(x, s).float() * s).bfloat16())


@on_a_gpu
def test_halves_round_to_even():
    k = 512
    x = ((torch.arange(-4096, 4096, dtype=torch.float32) / 32).reshape(16, k)).to(torch.float32)
    codes = np.zeros((16, k), np.int8)
    codes[:, ::32] = np.eye(16, dtype=np.int8)
    layer = (codes, np.ones((16, 1), np.float32), np.float32(1), np.float32(2), np.full(16, 0.5, np.float32))
    for tile in TILES.values():
        check_linear(cuda.linear, 4, x * 16, *layer, tile=tile)


@on_a_gpu
def test_only_rows_of_whole_words():
    rng = generator()
    for m, k in ((17, 64), (4, 80)):
        layer = random_layer(rng, 9, k, 4)
        args = [tensor(v) for v in layer[1:]]
        with pytest.raises(ValueError, match="16 bytes"):
            cuda.linear(activations(rng, m, k).to(DEVICE), rows_of(layer[0], 4), *args, 4, tile=RowsTile(64, 4, 2))


@on_a_gpu
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tensors_that_do_not_lie_at_16_bytes(bits):
    rng = generator(bits)
    layer = random_layer(rng, 96, 1024, bits)
    args = [tensor(v) for v in layer[1:]]
    packed = rows_of(layer[0], bits)
    moved = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(packed.shape)
    for m in (2, 8, 16):
        x = activations(rng, m, 1024).to(DEVICE)
        y = cuda.linear(x, packed, *args, bits, tile=TILES["one launch"])
        assert torch.equal(cuda.linear(x, moved, *args, bits), y)
        elsewhere = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        for tile in TILES.values():
            assert torch.equal(cuda.linear(elsewhere, packed, *args, bits, tile=tile), y)


def quantize(x: Values, inverse: Values) -> Values:
    v = torch.nan_to_num(x.to(torch.float32) * inverse, nan=127.0)
    return v.clamp(-128, 127).round().to(torch.int8)


def plane_of_bytes(packed: Values, plane: int, bits: int, shift: int) -> Values:
    codes = ((packed.to(torch.int32) << (8 - bits - bits * plane)) & (256 - (1 << (8 - bits)))) ^ 0x80
    return codes.to(torch.int8) >> (8 - bits if shift == 0 else 0)


GIVEN: dict[str, Any] = {
    "BYTES": 128,
    "_codes_layout": lambda rows: None,
    "_quantize": quantize,
    "plane_of_bytes": plane_of_bytes,
    "round_codes": lambda v: torch.nan_to_num(v, nan=127.0).clamp(-128, 127).round() + 0.0,
    "rounded_to": lambda v, dtype: v.to(dtype),
    "rounded_to_int": lambda v: v.round().to(torch.int32),
}


def by_torch(self: Launch, *tensors: torch.Tensor) -> None:
    """A launch of `rows_linear` run by torch; the other kernel's, `quantize_planes`, as it is said to do."""
    if self.kernel is rows_linear:
        names = rows_linear.arg_names[-len(self.constants) :]
        constants = [self.constants[name] for name in names]
        gluon_torch.run(rows_linear, self.grid, self.warps, GIVEN, *tensors, *self.numbers, *constants)
        return
    x, scale, q, arrived = tensors
    tiles, in_features, stride = self.numbers
    per, rows = self.constants["PLANES"], self.grid[0]
    codes = torch.zeros(rows, stride * per, dtype=torch.int8)
    codes[:, :in_features] = numerics.quantize(x.view(rows, -1), scale)
    q.copy_(codes.view(rows, -1, per).transpose(1, 2).reshape(-1))
    arrived[:tiles] = 0


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernel itself runs on a GPU; torch need not run twice")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", TILES)
def test_what_the_kernel_says(monkeypatch, bits, name):
    """Ragged shapes, each kind of activation, each side present or absent."""
    monkeypatch.setattr(Launch, "__call__", by_torch)
    rng = generator(bits, name)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for (m, n, k), dtype in zip(((3, 37, 1600), (16, 70, 448), (9, 64, 1024)), dtypes, strict=True):
        check_sides(rng, bits, TILES[name], activations(rng, m, k, dtype), n)


def test_only_devices_of_its_own_table_take_it():
    problem = (16, 12288, 1536, 4, 0)
    assert straight(*problem[:1], *problem[2:])
    assert any(isinstance(row.tile, RowsTile) for row in TABLE["sm90"])
    assert isinstance(linear_tile("sm90", *problem), RowsTile)
    for other in ("sm80", "sm100", "cpu"):
        assert not isinstance(linear_tile(other, *problem), RowsTile)
