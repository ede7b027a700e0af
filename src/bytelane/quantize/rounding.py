"""Round-to-nearest weights: the scale is the smallest that clips nothing, the codes are the nearest to the weights.

For a row (or a group of a row) `w` and a width N with codes `qmin = -2^(N-1) .. qmax = 2^(N-1)-1`, in float32:

    s = max(max(w) / qmax, min(w) / qmin)      both ends of the range count: the lower reaches further
    c = clamp(rne(w / s), qmin, qmax)              rne rounds half to even

so `|c * s - w| <= s / 2`, up to float32 rounding. A row of zeros fits every scale: it gets the largest one of its
tensor (1.0 where all rows are zero), because the phone's runtime refuses a scale of 0, and a scale unlike the others
could push the layer's requantization multiplier out of range. A row whose scale would be subnormal, which that runtime
refuses as well, is rounded to zeros in the same way; its weights are below 1e-36.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bytelane.errors import ScaleError, TensorShapeError
from bytelane.scheme import WeightScheme, code_range

_CHUNK_WEIGHTS = 1 << 22
"""Weights rounded at a time: bounds the float32 scratch however large the table is."""

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _row_scales(chunk: Tensor, num_bits: int) -> Tensor:
    """The smallest scales that clip nothing: float32 `[rows, groups, size]` to `[rows, groups]`."""
    low, high = code_range(num_bits)
    return torch.maximum(chunk.amax(-1) / high, chunk.amin(-1) / low)


def round_to_nearest(weight: Tensor, scheme: WeightScheme, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Quantize a weight matrix or an embedding table.

    Args:
        weight: `[out, in]`, floating point.
        scheme: the width, and the group size where scales are per group.
        name: named in errors.

    Returns:
        int8 codes `[out, in]` and float32 scales `[out, groups]`, all positive and normal.

    Raises:
        GroupSizeError: the group size does not divide `in`.
        ScaleError: a weight is NaN or infinite.
        TensorShapeError: the weight is not a matrix, or is empty.
    """
    if weight.dim() != 2 or not weight.numel() or not weight.dtype.is_floating_point:
        raise TensorShapeError(
            f"a weight to round must be a floating-point matrix, found {tuple(weight.shape)} of {weight.dtype}",
            tensor=name,
        )
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    low, high = code_range(scheme.num_bits)
    step = max(1, _CHUNK_WEIGHTS // columns)
    chunks = [(i, min(i + step, rows)) for i in range(0, rows, step)]

    def grouped(start: int, stop: int) -> Tensor:
        return weight[start:stop].detach().to(torch.float32).reshape(stop - start, groups, -1)

    scale = torch.cat([_row_scales(grouped(*chunk), scheme.num_bits) for chunk in chunks])
    if not bool(torch.isfinite(scale).all()):
        raise ScaleError("a weight is NaN or infinite; repair the float model first", tensor=name)
    flat = scale < _SMALLEST_NORMAL
    largest = float(scale.max())
    fill = largest if largest >= _SMALLEST_NORMAL else 1.0
    scale = scale.masked_fill(flat, fill)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    for start, stop in chunks:
        nearest = torch.round(grouped(start, stop) / scale[start:stop, :, None])
        codes[start:stop] = torch.clamp(nearest, low, high).to(torch.int8).flatten(1)
    return codes, scale


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes stand for: float32 `[out, in]` of int8 codes `[out, in]` and float32 scales `[out, groups]`."""
    grouped = codes.to(torch.float32).reshape(codes.shape[0], scale.shape[1], -1)
    return (grouped * scale[..., None]).reshape(codes.shape)
