"""Sums of int32 accumulators over tensor-parallel ranks, by an all-reduce that is handed in (vLLM's own, under vLLM).

An accumulator is an integer, so its sum is the same bits in any order: over any number of ranks, on any network. On
CUDA, vLLM's all-reduce takes int32 as it is (NCCL). On CPUs its shared-memory all-reduce takes floats only, so the
integers travel in float32, which is exact below 2^24:

- a layer whose every possible sum stays below 2^24, `128 * 2^(N-1) * in_features <= 2^24`, sends one float32 for each
  accumulator (4 bits: up to 16384 inputs, 2 bits: up to 65536, 8 bits: up to 1024);
- any other sends two, the accumulator's low 12 bits and the rest, each far below 2^24 over any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""A tensor of this rank to the sum over all ranks; it may write into the tensor it is given."""

EXACT_FLOAT32 = 1 << 24
"""Every integer up to here is a float32, and so is every partial sum on the way."""

_LOW_BITS = 12


def largest_sum(num_bits: int, in_features: int) -> int:
    """The largest magnitude an accumulator of all ranks together can have."""
    return 128 * (1 << (num_bits - 1)) * in_features


def reduced_bytes(rows: int, out_features: int, num_bits: int, in_features: int, device: str) -> int:
    """Bytes of the tensor one rank hands to the all-reduce for one layer, in all for `rows` tokens."""
    planes = 1 if device != "cpu" or largest_sum(num_bits, in_features) <= EXACT_FLOAT32 else 2
    return 4 * planes * rows * out_features


def all_reduce_accumulators(acc: Tensor, num_bits: int, in_features: int, all_reduce: AllReduce) -> Tensor:
    """The exact sum over ranks: int32 `[M, out, 1]` to the same.

    Args:
        acc: this rank's partial accumulators.
        num_bits: of the weights.
        in_features: of the layer, all ranks together.
        all_reduce: of int32 on CUDA, of float32 on CPUs.
    """
    if acc.device.type != "cpu":
        return all_reduce(acc)
    if largest_sum(num_bits, in_features) <= EXACT_FLOAT32:
        return all_reduce_float(acc, all_reduce).to(torch.int32)
    high = acc >> _LOW_BITS
    low = acc - (high << _LOW_BITS)
    high, low = all_reduce_float(torch.stack((high, low)), all_reduce).to(torch.int32).unbind(0)
    return (high << _LOW_BITS) + low


def all_reduce_float(partial: Tensor, all_reduce: AllReduce) -> Tensor:
    """The sum over ranks in float32."""
    return all_reduce(partial.to(torch.float32))
