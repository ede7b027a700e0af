"""The Triton kernels on torch tensors: checks, the output tensor, the launch.

Everything here is the bits of `bytelane.numerics` whatever tile is chosen. The argument order is that of
`torch.ops.bytelane`. Scales and biases are float32; activations are made contiguous where they are not; weights must
be. Group sizes must be whole blocks (`GROUP_BITS`). The layer without an input scale is in cuda_weight_only.py.

Tensors lie on one CUDA device, or, in Triton's interpreter (`TRITON_INTERPRET=1`), on the CPU.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bytelane.kernels import triton_configs as configs
from bytelane.kernels.cuda_weight_only import linear_weight_only
from bytelane.kernels.triton_codes import code_shift, planes
from bytelane.kernels.triton_configs import CodesTile, DecodeTile, FusedTile, RowsTile, Tile, power_of_two
from bytelane.kernels.triton_decode import decode_linear
from bytelane.kernels.triton_launch import (
    ALIGNED,
    GROUP_BITS,
    Launch,
    Layout,
    device_class,
    layout,
    overlaps,
    require,
)
from bytelane.kernels.triton_linear import codes_linear, fused_linear, quantize_planes
from bytelane.kernels.triton_pointwise import gather_rows, requantize_rows
from bytelane.kernels.triton_rows import CHUNK, rows_linear

__all__ = [
    "FUSED_ROWS",
    "GROUP_BITS",
    "accumulate",
    "embedding",
    "linear",
    "linear_weight_only",
    "quantize",
    "requantize",
]

FUSED_ROWS = 16
"""The most rows of the kernel that does everything in one launch."""

PREFETCH_BYTES = 12 << 20
"""The most bytes of a weight to ask for before the kernel before is done: what the memory moves meanwhile."""


class _Layer(NamedTuple):
    """The checked tensors of a layer; `input_scale` None where accumulators are wanted."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    output_scale: Tensor | None
    bias: Tensor | None

    @property
    def outputs(self) -> int:
        """How the kernels call the output scales: 0 none, 1 one, 2 one for each channel."""
        return 0 if self.output_scale is None else 2 if self.output_scale.numel() > 1 else 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the kernels take them: another float32 tensor, which is not read, for each that is absent."""
        weight, weight_scale, input_scale, output_scale, bias = self
        any_scale = weight_scale if input_scale is None else input_scale
        return (
            weight,
            weight_scale,
            any_scale,
            any_scale if output_scale is None else output_scale,
            any_scale if bias is None else bias,
        )


def _check_output_scale(scale: Tensor | None, n: int) -> None:
    if scale is not None:
        require(scale, torch.float32, n if scale.dim() == 1 and scale.numel() == n else 1, "output_scale")


def _prefetch(form: Layout, overlapping: bool, aligned: bool, bn: int, warps: int) -> tuple[int, int]:
    """What of each row of the weight to ask for before the kernel before is done: bytes of a piece, and pieces."""
    wanted = min(form.row_bytes, PREFETCH_BYTES // form.out_features) // ALIGNED
    if not overlapping or not aligned or form.row_bytes % ALIGNED or not wanted:
        return 0, 1
    pieces = min(max(32 * warps // bn, 1), power_of_two(wanted + 1) // 2)
    return wanted // pieces * ALIGNED, pieces


def _layer_constants(bits: int, k: int, outputs: int, has_bias: bool) -> dict[str, int | bool]:
    """What every kernel that multiplies is compiled for."""
    return {
        "BITS": bits,
        "PLANES": planes(bits),
        "SHIFT": code_shift(bits, k),
        "OUTPUTS": outputs,
        "BIAS": has_bias,
    }


@functools.lru_cache(maxsize=4096)
def _decode_launch(form: Layout, m: int, tile: DecodeTile, outputs: int, has_bias: bool, overlapping: bool) -> Launch:
    n, k, bits, row_bytes, *_ = form
    ahead, pieces = _prefetch(form, overlapping, True, tile.bn, tile.warps)
    constants = {
        **_layer_constants(bits, k, outputs, has_bias),
        "STEPS": triton.cdiv(row_bytes // 4, tile.bw),
        "BN": tile.bn,
        "BM": power_of_two(m),
        "BW": tile.bw,
        "PDL": overlapping,
        "PREFETCH": ahead > 0,
        "PIECES": pieces,
    }
    numbers = (m, n, k, row_bytes // 4, ahead)
    grid = (triton.cdiv(n, tile.bn), 1)
    return Launch(decode_linear, grid, numbers, constants, tile.warps, overlaps=overlapping)


@functools.lru_cache(maxsize=4096)
def _fused_launch(
    form: Layout, m: int, tile: FusedTile, outputs: int, has_bias: bool, overlapping: bool, aligned: bool
) -> Launch:
    n, k, bits, row_bytes, groups, group_blocks = form
    ahead, pieces = _prefetch(form, overlapping, aligned, tile.bn, tile.warps)
    constants = {
        **_layer_constants(bits, k, outputs, has_bias),
        "GROUPED": groups > 1,
        "EVEN": form.even(tile.bn, tile.bb),
        "BN": tile.bn,
        "BM": power_of_two(m),
        "BB": tile.bb,
        "SPLIT": tile.split,
        "PDL": overlapping,
        "PREFETCH": ahead > 0,
        "PIECES": pieces,
    }
    numbers = (m, n, k, row_bytes, groups, group_blocks, ahead)
    return Launch(fused_linear, (triton.cdiv(n, tile.bn), 1), numbers, constants, tile.warps, tile.stages, overlapping)


@functools.lru_cache(maxsize=4096)
def _planes_launch(
    m: int, k: int, per: int, stride: int, tiles: int, are_codes: bool, overlapping: bool, early: bool = False
) -> Launch:
    blocks = min(power_of_two(stride), 1024 // per)
    constants = {"PLANES": per, "BLOCKS": blocks, "CODES": are_codes, "PDL": overlapping, "EARLY": early}
    return Launch(
        quantize_planes, (m, triton.cdiv(stride, blocks)), (tiles, k, stride), constants, overlaps=overlapping
    )


class _CodesPlan(NamedTuple):
    """Both launches of a layer with many rows, and the scratch between them, in elements."""

    quantize: Launch
    multiply: Launch
    plane_stride: int
    shared: int
    parts: int


@functools.lru_cache(maxsize=4096)
def _codes_plan(
    form: Layout, m: int, tile: CodesTile, outputs: int, has_bias: bool, accumulators: bool, overlapping: bool
) -> _CodesPlan:
    n, k, bits, row_bytes, groups, group_blocks = form
    blocks = groups * group_blocks
    # codes from one plane to the next: a whole number of tiles, and of 16 bytes
    stride = -(-blocks // 16) * 16 if groups > 1 else -(-blocks // tile.bb) * tile.bb
    tiles = triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm)
    chunk = -(-triton.cdiv(group_blocks, tile.splits) // tile.bb) * tile.bb
    splits = 1 if groups > 1 else max(triton.cdiv(group_blocks, max(chunk, 1)), 1)
    # the tiles of whole waves have a program each, those after them `splits`
    whole = tiles // tile.wave * tile.wave if tile.wave and splits > 1 else 0
    if whole == tiles:
        splits = 1
    shared = tiles - whole if splits > 1 else 0
    constants = {
        **_layer_constants(bits, k, outputs, has_bias),
        "GROUPED": groups > 1,
        "EVEN": form.even(tile.bn, tile.bb),
        "ACCUMULATE": accumulators,
        "BN": tile.bn,
        "BM": tile.bm,
        "BB": tile.bb,
        "BAND": tile.band,
        "SPLITS": splits,
        "PDL": overlapping,
    }
    numbers = (m, n, row_bytes, stride, chunk, whole, groups, group_blocks)
    programs = (tiles + shared * (splits - 1), 1)
    return _CodesPlan(
        _planes_launch(m, k, planes(bits), stride, shared, accumulators, overlapping),
        Launch(codes_linear, programs, numbers, constants, tile.warps, tile.stages, overlapping),
        stride,
        shared,
        shared * splits * tile.bn * tile.bm,
    )


def _codes(x: Tensor, layer: _Layer, y: Tensor, m: int, form: Layout, tile: CodesTile) -> None:
    """Activations to planes of codes, then `codes_linear`; without an input scale `x` is codes, to accumulators."""
    accumulators = layer.input_scale is None
    plan = _codes_plan(form, m, tile, layer.outputs, layer.bias is not None, accumulators, overlaps(x.device))
    arrived = torch.empty(plan.shared, dtype=torch.int32, device=x.device)
    parts = torch.empty(plan.parts, dtype=torch.int32, device=x.device)
    q = torch.empty(m * planes(form.num_bits) * plan.plane_stride, dtype=torch.int8, device=x.device)
    tensors = layer.tensors
    plan.quantize(x, tensors[2], q, arrived)
    plan.multiply(q, *tensors, y, parts, arrived)


class _RowsPlan(NamedTuple):
    """The launches of a layer with a few rows, one or two, and the scratch of the two, in elements."""

    quantize: Launch | None
    multiply: Launch
    codes: int
    tiles: int
    parts: int


@functools.lru_cache(maxsize=4096)
def _rows_plan(form: Layout, m: int, tile: RowsTile, outputs: int, has_bias: bool, overlapping: bool) -> _RowsPlan:
    n, k, bits, row_bytes, *_ = form
    steps = triton.cdiv(triton.cdiv(row_bytes, CHUNK), tile.splits)
    splits = triton.cdiv(row_bytes, CHUNK * steps)
    depth, stride = min(tile.depth, steps), CHUNK * steps * splits
    tiles = triton.cdiv(n, tile.bn)
    bm = max(power_of_two(m), 8)
    whole = stride == row_bytes
    # what of each part of a row to ask for, beyond the chunks that are loaded at once
    wanted = min((steps - depth) * CHUNK, PREFETCH_BYTES // (n * splits) - depth * CHUNK) // ALIGNED
    pieces = 0
    if tile.ask and overlapping and whole and wanted > 0:
        pieces = min(max(32 * tile.warps // tile.bn, 1), power_of_two(wanted + 1) // 2)
    constants = {
        **_layer_constants(bits, k, outputs, has_bias),
        "WHOLE": whole,
        "CODES": splits > 1,
        "STEPS": steps,
        "SPLITS": splits,
        "DEPTH": depth,
        "BN": tile.bn,
        "BM": bm,
        "PDL": overlapping,
        "EARLY": overlapping and tile.early,
        "PIECES": pieces,
    }
    numbers = (m, n, k, row_bytes, stride, wanted // pieces * ALIGNED if pieces else 0)
    multiply = Launch(rows_linear, (tiles, splits), numbers, constants, tile.warps, overlaps=overlapping)
    if splits == 1:
        return _RowsPlan(None, multiply, 0, 0, 0)
    per = planes(bits)
    quantize = _planes_launch(m, k, per, stride, tiles, False, overlapping, overlapping and tile.early)
    return _RowsPlan(quantize, multiply, m * per * stride, tiles, tiles * splits * tile.bn * bm)


def _rows(x: Tensor, layer: _Layer, y: Tensor, m: int, form: Layout, tile: RowsTile) -> None:
    plan = _rows_plan(form, m, tile, layer.outputs, layer.bias is not None, overlaps(x.device))
    tensors = layer.tensors
    if plan.quantize is None:
        # activations are read 4 bytes at a time and more
        plan.multiply(x.clone() if x.data_ptr() % ALIGNED else x, *tensors, y, y, y)
        return
    arrived = torch.empty(plan.tiles, dtype=torch.int32, device=x.device)
    parts = torch.empty(plan.parts, dtype=torch.int32, device=x.device)
    q = torch.empty(plan.codes, dtype=torch.int8, device=x.device)
    plan.quantize(x, tensors[2], q, arrived)
    plan.multiply(q, *tensors, y, parts, arrived)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int = 0,
    *,
    launches: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """See `numerics.linear_integer`; `weight` are canonical rows.

    Args:
        x: `[..., K]`.
        weight: uint8 `[N, row bytes]`.
        weight_scale: `[N, groups]`.
        input_scale: one.
        output_scale: one, `[N]`, or None.
        bias: `[N]` or None.
        num_bits: the width.
        group_size: inputs in a group, 0 for one scale per channel.
        launches: 1 for `fused_linear` (at most `FUSED_ROWS` rows), 2 for `codes_linear`, 0 for what the table of tiles
            says.
        tile: instead of the table's; it decides the kernel too.
    """
    k, n = x.shape[-1], weight.shape[0]
    form = layout(n, k, num_bits, group_size)
    require(weight, torch.uint8, n * form.row_bytes, "weight rows")
    require(weight_scale, torch.float32, n * form.groups, "weight_scale")
    require(input_scale, torch.float32, 1, "input_scale")
    _check_output_scale(output_scale, n)
    if bias is not None:
        require(bias, torch.float32, n, "bias")
    m = x.numel() // k if k else math.prod(x.shape[:-1])
    if m > FUSED_ROWS and (launches == 1 or isinstance(tile, FusedTile)):
        raise ValueError(f"one launch takes up to {FUSED_ROWS} rows, found {m}")
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0 or n == 0:
        return y
    layer = _Layer(weight, weight_scale, input_scale, output_scale, bias)
    aligned = weight.data_ptr() % ALIGNED == 0
    if tile is None:
        launches = launches or int(m <= FUSED_ROWS and not aligned)
        tile = configs.linear_tile(device_class(x.device), m, n, k, num_bits, group_size, launches, x.itemsize)
    if isinstance(tile, CodesTile):
        _codes(x, layer, y, m, form, tile)
        return y
    if isinstance(tile, RowsTile):
        if not (aligned and configs.straight(m, k, num_bits, group_size)):
            raise ValueError(f"no words of 16 bytes: {m} rows, {k} inputs of {num_bits} bits, groups of {group_size}")
        _rows(x, layer, y, m, form, tile)
        return y
    overlapping = tile.pdl and overlaps(x.device)
    if isinstance(tile, DecodeTile):
        if not (aligned and configs.decodable(m, k, num_bits, group_size)):
            raise ValueError(f"no words of 16 bytes: {m} rows, {k} inputs of {num_bits} bits, groups of {group_size}")
        _decode_launch(form, m, tile, layer.outputs, bias is not None, overlapping)(x, *layer.tensors, y)
    else:
        _fused_launch(form, m, tile, layer.outputs, bias is not None, overlapping, aligned)(x, *layer.tensors, y)
    return y


def accumulate(
    q: Tensor, weight: Tensor, num_bits: int, group_size: int = 0, *, tile: CodesTile | None = None
) -> Tensor:
    """See `numerics.accumulate`; `weight` are canonical rows."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"q must be int8 [M, in], found {tuple(q.shape)} of {q.dtype}")
    (m, k), n = q.shape, weight.shape[0]
    form = layout(n, k, num_bits, group_size)
    require(weight, torch.uint8, n * form.row_bytes, "weight rows")
    acc = torch.empty((m, n, form.groups), dtype=torch.int32, device=q.device)
    if acc.numel() == 0:
        return acc
    chosen = tile or configs.linear_tile(device_class(q.device), m, n, k, num_bits, group_size, 2)
    assert isinstance(chosen, CodesTile)
    ones = torch.ones(n * form.groups, dtype=torch.float32, device=q.device)  # scales, which accumulators do not have
    _codes(q.contiguous(), _Layer(weight, ones, None, None, None), acc, m, form, chosen)
    return acc


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """See `numerics.quantize`."""
    x = x.contiguous()
    count = x.numel()
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if count:
        require(scale, torch.float32, 1, "scale")
        _planes_launch(1, count, 1, count, 0, False, overlaps(x.device))(x, scale, q, q)
    return q


@functools.lru_cache(maxsize=1024)
def _requantize_launch(m: int, n: int, groups: int, outputs: int, has_bias: bool) -> Launch:
    bn = min(power_of_two(n), 1024)
    constants = {"OUTPUTS": outputs, "BIAS": has_bias, "GROUPED": groups > 1, "BN": bn}
    return Launch(requantize_rows, (m, triton.cdiv(n, bn)), (n, groups), constants)


def requantize(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `numerics.requantize`."""
    if acc.dtype != torch.int32 or acc.dim() != 3:
        raise ValueError(f"acc must be int32 [M, out, groups], found {tuple(acc.shape)} of {acc.dtype}")
    m, n, groups = acc.shape
    require(weight_scale, torch.float32, n * groups, "weight_scale")
    require(input_scale, torch.float32, 1, "input_scale")
    _check_output_scale(output_scale, n)
    if bias is not None:
        require(bias, torch.float32, n, "bias")
    y = torch.empty((m, n), dtype=dtype, device=acc.device)
    if y.numel():
        layer = _Layer(acc, weight_scale, input_scale, output_scale, bias)
        _requantize_launch(m, n, groups, layer.outputs, bias is not None)(acc.contiguous(), *layer.tensors[1:], y)
    return y


@functools.lru_cache(maxsize=1024)
def _embedding_launch(count: int, numbers: tuple[float, ...], dim: int, num_bits: int) -> Launch:
    block = min(power_of_two(dim), 1024)
    return Launch(gather_rows, (count, triton.cdiv(dim, block)), numbers, {"BITS": num_bits, "BLOCK": block})


def embedding(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    num_bits: int,
    embedding_dim: int,
    embed_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `numerics.embedding`; `weight` are the canonical rows of the whole table, of which only `ids` are read.

    The rows may lie apart. An id that is not a row gives a row of NaN: a kernel cannot raise.
    """
    rows, groups = weight_scale.shape
    row_bytes = (embedding_dim * num_bits + 7) // 8
    if weight.dtype != torch.uint8 or weight.shape != (rows, row_bytes) or (row_bytes > 1 and weight.stride(1) != 1):
        raise ValueError(f"{rows} rows of {row_bytes} bytes expected, found {tuple(weight.shape)} of {weight.dtype}")
    if weight_scale.dtype != torch.float32 or (groups > 1 and weight_scale.stride(1) != 1):
        raise ValueError(f"weight_scale must be float32 with contiguous rows, found {weight_scale.dtype}")
    y = torch.empty((*ids.shape, embedding_dim), dtype=dtype, device=ids.device)
    if y.numel():
        strides = (weight.stride(0), weight_scale.stride(0))
        group_size = max(embedding_dim // max(groups, 1), 1)
        numbers = (rows, *strides, row_bytes, embedding_dim, group_size, embed_scale)
        launch = _embedding_launch(ids.numel(), numbers, embedding_dim, num_bits)
        launch(ids.contiguous(), weight, weight_scale, y)
    return y
