"""The operations in plain torch on canonical rows: `bytelane.numerics` behind the operations' signatures.

These run on any device and are what every other kernel is compared with. The weight-only matmul works on blocks of
output channels, so that no layer's weight is ever dense as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bytelane import numerics
from bytelane.packing import unpack_rows

_BLOCK_CODES = 1 << 24
"""Weights made dense at a time in the weight-only matmul: 64 MiB in float32."""


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """See `torch.ops.bytelane.quantize`."""
    return numerics.quantize(x, scale)


def accumulate(q: Tensor, weight: Tensor, num_bits: int, group_size: int) -> Tensor:
    """See `torch.ops.bytelane.accumulate`."""
    return numerics.accumulate(q, unpack_rows(weight, num_bits, q.shape[1]), group_size)


def requantize(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `torch.ops.bytelane.requantize`."""
    return numerics.requantize(acc, weight_scale, input_scale, output_scale, bias, dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
) -> Tensor:
    """See `torch.ops.bytelane.linear`."""
    codes = unpack_rows(weight, num_bits, x.shape[-1])
    return numerics.linear_integer(x, codes, weight_scale, input_scale, output_scale, bias, group_size)


def linear_emulated(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
) -> Tensor:
    """See `torch.ops.bytelane.linear_emulated`."""
    codes = unpack_rows(weight, num_bits, x.shape[-1])
    return numerics.linear_emulated(x, codes, weight_scale, input_scale, output_scale, bias)


def linear_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, output_scale: Tensor | None, bias: Tensor | None, num_bits: int
) -> Tensor:
    """See `torch.ops.bytelane.linear_weight_only`."""
    out_features, in_features = weight.shape[0], x.shape[-1]
    step = max(1, _BLOCK_CODES // max(in_features, 1))
    y = x.new_empty(*x.shape[:-1], out_features)
    for start in range(0, out_features, step):
        block = slice(start, start + step)
        codes = unpack_rows(weight[block], num_bits, in_features)
        part_bias = None if bias is None else bias[block]
        y[..., block] = numerics.linear_emulated(x, codes, weight_scale[block], bias=part_bias)
    return y if output_scale is None else numerics.fake_quantize(y, output_scale)


def embedding(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    num_bits: int,
    embedding_dim: int,
    embed_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `torch.ops.bytelane.embedding`."""
    flat = ids.reshape(-1)
    codes = unpack_rows(weight.index_select(0, flat), num_bits, embedding_dim)
    rows = numerics.embedding(codes, weight_scale.index_select(0, flat), embed_scale, dtype)
    return rows.reshape(*ids.shape, embedding_dim)
