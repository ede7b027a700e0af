"""The Triton kernels on torch tensors: checks, the output tensor, the launch.

Everything here is the bits of `bytelane.numerics` whatever tile is chosen; `linear_weight_only` alone may differ from
it in the last place. The argument order is that of `torch.ops.bytelane`. Scales and biases are float32; activations are
made contiguous where they are not; weights must be. Group sizes must be whole blocks (`GROUP_BITS`).

Tensors lie on one CUDA device, or, in Triton's interpreter (`TRITON_INTERPRET=1`), on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, cast

import torch
import triton
from torch import Tensor

from bytelane.kernels import triton_configs as configs
from bytelane.kernels.triton_codes import code_shift, planes
from bytelane.kernels.triton_configs import CodesTile, FusedTile, power_of_two
from bytelane.kernels.triton_digits import digits_linear
from bytelane.kernels.triton_linear import codes_linear, fused_linear, quantize_planes
from bytelane.kernels.triton_pointwise import gather_rows, requantize_rows
from bytelane.kernels.triton_weight_only import weight_only_linear

GROUP_BITS = 8
"""A group is a whole multiple of this many bits, so that it is whole blocks (triton_codes.py) at every width."""

FUSED_ROWS = 16
"""The most rows of the kernel that does everything in one launch."""

PREFETCH_BYTES = 12 << 20
"""The most bytes of a weight to ask for before the kernel before is done: what the memory moves meanwhile."""


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, bool]:
    """A device's class, and whether its launches may overlap the one before (programmatic dependent launch)."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return configs.device_class(device), overlaps


def _class(x: Tensor) -> str:
    return _device(x.device)[0]


def _overlaps(x: Tensor) -> bool:
    return _device(x.device)[1]


def _launch(overlapping: bool) -> dict[str, bool]:
    """Options of every launch: a product and a sum are two roundings; whether it overlaps the launch before."""
    return {"enable_fp_fusion": False, "launch_pdl": True} if overlapping else {"enable_fp_fusion": False}


def _guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _require(tensor: Tensor, dtype: torch.dtype, count: int, what: str) -> Tensor:
    """A tensor that has exactly the form a kernel reads."""
    if tensor.dtype is not dtype or tensor.numel() != count or not tensor.is_contiguous():
        raise ValueError(
            f"{what} must be {count} contiguous {dtype}, found {tuple(tensor.shape)} of {tensor.dtype}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return tensor


def _output_scales(scale: Tensor | None, n: int) -> int:
    """How the kernels call the output scales: 0 none, 1 one, 2 one for each of `n` channels."""
    if scale is None:
        return 0
    several = scale.dim() == 1 and scale.numel() == n and n != 1
    _require(scale, torch.float32, n if several else 1, "output_scale")
    return 2 if several else 1


def _rows(weight: Tensor, k: int, num_bits: int, group_size: int) -> tuple[int, int, int, int]:
    """`(N, bytes in a row, groups, blocks in a group)` of checked canonical rows."""
    n, row_bytes = weight.shape[0], (k * num_bits + 7) // 8
    _require(weight, torch.uint8, n * row_bytes, "weight rows")
    group_size = 0 if group_size == k else group_size  # a group as long as the row is a channel
    if group_size * num_bits % GROUP_BITS:
        raise ValueError(f"groups of {group_size} codes of {num_bits} bits are no whole number of bytes")
    groups = k // group_size if group_size else 1
    return n, row_bytes, groups, -(-(group_size or k) // planes(num_bits))


def _layer(
    weight: Tensor, weight_scale: Tensor, bias: Tensor | None, k: int, num_bits: int, group_size: int
) -> tuple[int, int, int, int]:
    """As `_rows`, of a layer whose scales and bias are checked too."""
    n, row_bytes, groups, group_blocks = _rows(weight, k, num_bits, group_size)
    _require(weight_scale, torch.float32, n * groups, "weight_scale")
    if bias is not None:
        _require(bias, torch.float32, n, "bias")
    return n, row_bytes, groups, group_blocks


def _even(row_bytes: int, group_blocks: int, num_bits: int, n: int, bn: int, bb: int) -> bool:
    """Whether every tile lies inside the rows."""
    return 8 % num_bits == 0 and group_blocks % bb == 0 and n % bn == 0


def linear_fused(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int = 0,
    *,
    tile: FusedTile | None = None,
) -> Tensor:
    """See `numerics.linear_integer`; one launch, at most `FUSED_ROWS` rows; `weight` are canonical rows."""
    *batch, k = x.shape
    m = math.prod(batch)
    n, row_bytes, groups, group_blocks = _layer(weight, weight_scale, bias, k, num_bits, group_size)
    y = torch.empty((*batch, n), dtype=x.dtype, device=x.device)
    if m > FUSED_ROWS:
        raise ValueError(f"takes up to {FUSED_ROWS} rows, found {m}")
    if y.numel() == 0:
        return y
    t = cast(FusedTile, tile or configs.linear_tile(_class(x), m, n, k, num_bits, group_size, 1, x.itemsize))
    pdl = t.pdl and _overlaps(x)
    rows_ready = row_bytes % 16 == 0 and weight.data_ptr() % 16 == 0
    with _guard(x):
        fused_linear[(triton.cdiv(n, t.bn),)](
            x.contiguous(),
            weight,
            weight_scale,
            _require(input_scale, torch.float32, 1, "input_scale"),
            input_scale if output_scale is None else output_scale,
            input_scale if bias is None else bias,
            y,
            m,
            n,
            k,
            row_bytes,
            groups,
            group_blocks,
            BITS=num_bits,
            PLANES=planes(num_bits),
            SHIFT=code_shift(num_bits, k),
            OUTPUTS=_output_scales(output_scale, n),
            BIAS=bias is not None,
            GROUPED=groups > 1,
            EVEN=_even(row_bytes, group_blocks, num_bits, n, t.bn, t.bb),
            BN=t.bn,
            BM=power_of_two(m),
            BB=t.bb,
            SPLIT=t.split,
            PDL=pdl,
            PREFETCH=min(row_bytes, PREFETCH_BYTES // n) // 16 * 16 if pdl and rows_ready else 0,
            num_warps=t.warps,
            num_stages=t.stages,
            **_launch(pdl),
        )
    return y


def _planes_of(x: Tensor, scale: Tensor | None, num_bits: int, stride: int, arrived: Tensor) -> Tensor:
    """Activations `[M, K]`, floats or codes (no scale), as codes `[M, PLANES, stride]`; sets `arrived` to zero."""
    m, k = x.shape
    per = planes(num_bits)
    q = torch.empty((m, per, stride), dtype=torch.int8, device=x.device)
    blocks = min(power_of_two(stride), 1024 // per)
    overlaps = _overlaps(x)
    quantize_planes[(m, triton.cdiv(stride, blocks))](
        x,
        x if scale is None else _require(scale, torch.float32, 1, "input_scale"),
        q,
        arrived,
        arrived.numel(),
        k,
        stride,
        PLANES=per,
        BLOCKS=blocks,
        CODES=scale is None,
        PDL=overlaps,
        num_warps=4,
        **_launch(overlaps),
    )
    return q


def _codes(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    shape: tuple[int, int, int, int],
    num_bits: int,
    tile: CodesTile,
) -> None:
    """Both launches: activations to planes of codes, then `codes_linear`; without an input scale to accumulators."""
    (m, k), (n, row_bytes, groups, group_blocks) = x.shape, shape
    stride = _plane_stride(groups, group_blocks, tile.bb)
    tiles = triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm)
    chunk = -(-triton.cdiv(group_blocks, tile.splits) // tile.bb) * tile.bb
    splits = 1 if groups > 1 else max(triton.cdiv(group_blocks, max(chunk, 1)), 1)
    scratch = splits if splits > 1 else 0
    arrived = torch.empty(tiles if scratch else 0, dtype=torch.int32, device=x.device)
    parts = torch.empty(scratch * n * m, dtype=torch.int32, device=x.device)
    q = _planes_of(x, input_scale, num_bits, stride, arrived)
    scale = weight_scale if input_scale is None else input_scale  # accumulators have none: any float32 will do
    overlaps = _overlaps(x)
    codes_linear[(tiles, splits)](
        q,
        weight,
        weight_scale,
        scale,
        scale if output_scale is None else output_scale,
        scale if bias is None else bias,
        y,
        parts,
        arrived,
        m,
        n,
        row_bytes,
        stride,
        chunk,
        groups,
        group_blocks,
        BITS=num_bits,
        PLANES=planes(num_bits),
        SHIFT=code_shift(num_bits, k),
        OUTPUTS=_output_scales(output_scale, n),
        BIAS=bias is not None,
        GROUPED=groups > 1,
        EVEN=_even(row_bytes, group_blocks, num_bits, n, tile.bn, tile.bb),
        ACCUMULATE=input_scale is None,
        BN=tile.bn,
        BM=tile.bm,
        BB=tile.bb,
        BAND=tile.band,
        SPLITS=splits,
        PDL=overlaps,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_launch(overlaps),
    )


def _plane_stride(groups: int, group_blocks: int, bb: int) -> int:
    """Codes from one plane to the next: a whole number of tiles, and of 16 bytes."""
    blocks = groups * group_blocks
    return -(-blocks // 16) * 16 if groups > 1 else -(-blocks // bb) * bb


def linear_codes(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int = 0,
    *,
    tile: CodesTile | None = None,
) -> Tensor:
    """See `numerics.linear_integer`; two launches, any number of rows; `weight` are canonical rows."""
    *batch, k = x.shape
    m = math.prod(batch)
    n, row_bytes, groups, group_blocks = _layer(weight, weight_scale, bias, k, num_bits, group_size)
    y = torch.empty((*batch, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    t = cast(CodesTile, tile or configs.linear_tile(_class(x), m, n, k, num_bits, group_size, 2))
    flat, shape = x.contiguous().view(m, k), (n, row_bytes, groups, group_blocks)
    with _guard(x):
        _codes(flat, weight, weight_scale, input_scale, output_scale, bias, y, shape, num_bits, t)
    return y


def accumulate(
    q: Tensor, weight: Tensor, num_bits: int, group_size: int = 0, *, tile: CodesTile | None = None
) -> Tensor:
    """See `numerics.accumulate`; `weight` are canonical rows."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"q must be int8 [M, in], found {tuple(q.shape)} of {q.dtype}")
    m, k = q.shape
    n, row_bytes, groups, group_blocks = _rows(weight, k, num_bits, group_size)
    acc = torch.empty((m, n, groups), dtype=torch.int32, device=q.device)
    if acc.numel() == 0:
        return acc
    t = cast(CodesTile, tile or configs.linear_tile(_class(q), m, n, k, num_bits, group_size, 2))
    shape = (n, row_bytes, groups, group_blocks)
    ones = torch.ones(n * groups, dtype=torch.float32, device=q.device)  # scales, which accumulators do not have
    with _guard(q):
        _codes(q.contiguous(), weight, ones, None, None, None, acc, shape, num_bits, t)
    return acc


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int = 0,
) -> Tensor:
    """See `numerics.linear_integer`: in one launch or two, as the table of tiles says for the shape."""
    k = x.shape[-1]
    m = x.numel() // k if k else math.prod(x.shape[:-1])
    tile = configs.linear_tile(_class(x), m, weight.shape[0], k, num_bits, group_size, itemsize=x.itemsize)
    args = (x, weight, weight_scale, input_scale, output_scale, bias, num_bits, group_size)
    return linear_fused(*args, tile=tile) if isinstance(tile, FusedTile) else linear_codes(*args, tile=tile)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """See `numerics.quantize`."""
    x = x.contiguous()
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel():
        count = x.numel()
        blocks = 1024
        with _guard(x):
            quantize_planes[(1, triton.cdiv(count, blocks))](
                x,
                _require(scale, torch.float32, 1, "scale"),
                q,
                q,
                0,
                count,
                count,
                PLANES=1,
                BLOCKS=blocks,
                CODES=False,
                PDL=_overlaps(x),
                num_warps=4,
                **_launch(_overlaps(x)),
            )
    return q


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
    y = torch.empty((m, n), dtype=dtype, device=acc.device)
    if y.numel() == 0:
        return y
    bn = min(power_of_two(n), 1024)
    with _guard(acc):
        requantize_rows[(m, triton.cdiv(n, bn))](
            acc.contiguous(),
            _require(weight_scale, torch.float32, n * groups, "weight_scale"),
            _require(input_scale, torch.float32, 1, "input_scale"),
            input_scale if output_scale is None else output_scale,
            input_scale if bias is None else _require(bias, torch.float32, n, "bias"),
            y,
            n,
            groups,
            OUTPUTS=_output_scales(output_scale, n),
            BIAS=bias is not None,
            GROUPED=groups > 1,
            BN=bn,
            num_warps=4,
            **_launch(False),
        )
    return y


def linear_weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
) -> Tensor:
    """See `numerics.linear_emulated` without an input scale; `weight` are canonical rows, `x` is not float32."""
    *batch, k = x.shape
    m, groups = math.prod(batch), weight_scale.shape[1]
    group_size = k // groups if groups > 1 else 0
    n, row_bytes, groups, group_blocks = _layer(weight, weight_scale, bias, k, num_bits, group_size)
    y = torch.empty((*batch, n), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if num_bits == 2 and groups == 1:
        return _digits(x.contiguous(), weight, weight_scale, output_scale, bias, y, m, n, k, row_bytes)
    bm = max(8, min(64, power_of_two(m)))
    bb = max(32, min(power_of_two(group_blocks), 256 // planes(num_bits)))
    bn = 64
    with _guard(x):
        weight_only_linear[(triton.cdiv(n, bn), triton.cdiv(m, bm))](
            x.contiguous(),
            weight,
            weight_scale,
            weight_scale if output_scale is None else _require(output_scale, torch.float32, 1, "output_scale"),
            weight_scale if bias is None else bias,
            y,
            m,
            n,
            k,
            row_bytes,
            groups,
            group_blocks,
            BITS=num_bits,
            PLANES=planes(num_bits),
            OUTPUT=output_scale is not None,
            BIAS=bias is not None,
            GROUPED=groups > 1,
            EVEN=_even(row_bytes, group_blocks, num_bits, n, bn, bb),
            BN=bn,
            BM=bm,
            BB=bb,
            num_warps=4,
            num_stages=3 if 8 % num_bits == 0 else 2,
            **_launch(False),
        )
    return y


def _digits(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    m: int,
    n: int,
    k: int,
    row_bytes: int,
) -> Tensor:
    """Two bits, one scale per channel: exact sums, the bits of the CPU's kernel."""
    bm = min(4, power_of_two(m))
    bn, bb = 64, max(32, min(128, power_of_two(row_bytes)))
    with _guard(x):
        digits_linear[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
            x,
            weight,
            weight_scale,
            weight_scale if output_scale is None else _require(output_scale, torch.float32, 1, "output_scale"),
            weight_scale if bias is None else bias,
            y,
            m,
            n,
            k,
            row_bytes,
            OUTPUT=output_scale is not None,
            BIAS=bias is not None,
            EVEN=_even(row_bytes, row_bytes, 2, n, bn, bb),
            BN=bn,
            BM=bm,
            BB=bb,
            BK=min(1024, power_of_two(k)),
            num_warps=4,
            num_stages=4,
            **_launch(False),
        )
    return y


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
    if y.numel() == 0:
        return y
    block = min(power_of_two(embedding_dim), 1024)
    with _guard(ids):
        gather_rows[(ids.numel(), triton.cdiv(embedding_dim, block))](
            ids.contiguous(),
            weight,
            weight_scale,
            y,
            rows,
            weight.stride(0),
            weight_scale.stride(0),
            row_bytes,
            embedding_dim,
            max(embedding_dim // max(groups, 1), 1),
            embed_scale,
            BITS=num_bits,
            BLOCK=block,
            num_warps=4,
            **_launch(False),
        )
    return y
