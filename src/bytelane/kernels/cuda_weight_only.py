"""The layer without an input scale on CUDA tensors: checks, the output tensor, the launch.

Sums of 16-bit floats have an order, so this layer alone may differ from `bytelane.numerics` in the last place; at 2
bits with one scale per channel it is exact (triton_digits.py).
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from bytelane.kernels.triton_codes import planes
from bytelane.kernels.triton_configs import power_of_two
from bytelane.kernels.triton_digits import digits_linear
from bytelane.kernels.triton_launch import Launch, Layout, layout, require
from bytelane.kernels.triton_weight_only import weight_only_linear


@functools.lru_cache(maxsize=4096)
def _launch(form: Layout, m: int, has_output: bool, has_bias: bool) -> Launch:
    n, k, bits, row_bytes, groups, group_blocks = form
    bn, sides = 64, {"OUTPUT": has_output, "BIAS": has_bias}
    if bits == 2 and groups == 1:
        bm, bb = min(4, power_of_two(m)), max(32, min(128, power_of_two(row_bytes)))
        tile = {"EVEN": form.even(bn, bb), "BN": bn, "BM": bm, "BB": bb, "BK": min(1024, power_of_two(k))}
        grid = (triton.cdiv(m, bm), triton.cdiv(n, bn))
        return Launch(digits_linear, grid, (m, n, k, row_bytes), sides | tile, stages=4)
    bm = max(8, min(64, power_of_two(m)))
    bb = max(32, min(power_of_two(group_blocks), 256 // planes(bits)))
    codes = {"BITS": bits, "PLANES": planes(bits), "GROUPED": groups > 1}
    tile = {"EVEN": form.even(bn, bb), "BN": bn, "BM": bm, "BB": bb}
    numbers = (m, n, k, row_bytes, groups, group_blocks)
    grid = (triton.cdiv(n, bn), triton.cdiv(m, bm))
    return Launch(weight_only_linear, grid, numbers, codes | sides | tile, stages=3 if 8 % bits == 0 else 2)


def linear_weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
) -> Tensor:
    """See `numerics.linear_emulated` without an input scale; `weight` are canonical rows, `x` is not float32."""
    k, (n, groups) = x.shape[-1], weight_scale.shape
    form = layout(n, k, num_bits, k // groups if groups > 1 else 0)
    require(weight, torch.uint8, n * form.row_bytes, "weight rows")
    require(weight_scale, torch.float32, n * form.groups, "weight_scale")
    if output_scale is not None:
        require(output_scale, torch.float32, 1, "output_scale")
    if bias is not None:
        require(bias, torch.float32, n, "bias")
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel():
        m = math.prod(x.shape[:-1])
        launch = _launch(form, m, output_scale is not None, bias is not None)
        # a tensor that is not read stands for each that is absent
        absent = weight_scale
        launch(
            x,
            weight,
            weight_scale,
            absent if output_scale is None else output_scale,
            absent if bias is None else bias,
            y,
        )
    return y
