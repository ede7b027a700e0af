"""RMS norms on CUDA tensors: one launch for what transformers' modules do in six to eight."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from bytelane.kernels.triton_configs import power_of_two
from bytelane.kernels.triton_launch import Launch, require
from bytelane.kernels.triton_pointwise import norm_rows

MAX_WIDTH = 16384
"""The widest row, which a program holds whole."""


class NormForm(NamedTuple):
    """How a norm orders its roundings; see `float_ops.Norm` and `decoder.parts.NormPart`."""

    eps: float
    weight_in_t: bool = False
    plus_one: bool = False


@functools.lru_cache(maxsize=1024)
def _launch(rows: int, width: int, form: NormForm, has_weight: bool) -> Launch:
    block = power_of_two(width)
    constants = {
        "WEIGHT": has_weight,
        "IN_T": form.weight_in_t,
        "PLUS_ONE": form.plus_one,
        "BLOCK": block,
    }
    return Launch(norm_rows, (rows, 1), (width, form.eps), constants, warps=max(1, min(8, block // 256)))


def norm(x: Tensor, weight: Tensor | None, form: NormForm) -> Tensor:
    """`T(x * r * w)` of the last dimension, or in another order of roundings: the bits of `float_ops.norm_rows`.

    Args:
        x: `[..., width]` of T: float32, bfloat16 or float16.
        weight: `[width]` of T or float32; None for none.
        form: `eps` and the order.

    Raises:
        ValueError: a row wider than `MAX_WIDTH`, or a weight of another form.
    """
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"rows of up to {MAX_WIDTH} are normalized, found {width}")
    if weight is not None:
        if form.weight_in_t and weight.dtype is not x.dtype:
            raise ValueError(f"a weight that multiplies in {x.dtype} must be of it, found {weight.dtype}")
        require(weight, weight.dtype, width, "the norm's weight")
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        _launch(x.numel() // width, width, form, weight is not None)(x, x if weight is None else weight, y)
    return y
