"""The rules that scales and shapes must obey before a layer may be built from them.

Both doors lead here: tensors read from a checkpoint and tensors handed to `QuantLinear.from_codes`. A value that passes
has a result under the integer formulas; a value that does not is refused by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bytelane.errors import AccumulatorError, GroupSizeError, ScaleError, TensorDtypeError, TensorShapeError
from bytelane.scheme import WeightScheme, accumulator_limit, check_in_features


def check_scale(scale: Tensor, name: str) -> None:
    """Refuse a scale that is not floating point, or is negative, NaN or infinite anywhere."""
    if not scale.dtype.is_floating_point:
        raise TensorDtypeError(f"a scale must be floating point, found {scale.dtype}", tensor=name)
    if not scale.numel():
        return
    low, high = (float(v) for v in torch.aminmax(scale.detach().to(torch.float32)))
    if not (low >= 0 and high < float("inf")):  # also false for NaN, which aminmax propagates
        raise ScaleError(f"scales must be finite and not negative, found {low} to {high}", tensor=name)


def activation_scale(scale: Tensor | float | None, name: str) -> Tensor | None:
    """A static activation scale as float32 of shape `[]`; None when it is absent or exactly 0 (not calibrated).

    Raises:
        ScaleError: negative, NaN, infinite, or so small that `1 / s` is infinite in float32.
        TensorShapeError: more than one element.
    """
    if scale is None:
        return None
    tensor = torch.as_tensor(scale)
    if not tensor.dtype.is_floating_point:
        tensor = tensor.to(torch.float32) if not isinstance(scale, Tensor) else tensor
    if tensor.numel() != 1:
        raise TensorShapeError(f"an activation scale has one element, found {tuple(tensor.shape)}", tensor=name)
    check_scale(tensor, name)
    tensor = tensor.detach().to(torch.float32).reshape(())
    if float(tensor) == 0:
        return None
    if bool(torch.isinf(torch.reciprocal(tensor))):
        raise ScaleError(f"{float(tensor)} has no finite reciprocal in float32", tensor=name)
    return tensor


def weight_scales(scale: Tensor, out_features: int, groups: int, name: str) -> Tensor:
    """Weight scales as `[out, groups]`, dtype kept; `[out]` is accepted for one scale per channel.

    Raises:
        ScaleError: negative, NaN or infinite.
        GroupSizeError: another number of scales than `out * groups` asks for.
    """
    if scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() != 2 or scale.shape[0] != out_features:
        raise TensorShapeError(
            f"weight scales must be [{out_features}, {groups}], found {tuple(scale.shape)}", tensor=name
        )
    if scale.shape[1] != groups:
        raise GroupSizeError(f"{groups} scales a channel are needed, found {scale.shape[1]}", tensor=name)
    check_scale(scale, name)
    return scale


def check_integer_form(
    weight: WeightScheme,
    in_features: int,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Refuse a layer whose integer form leaves float32 or the accumulator behind.

    The requantization multiplier `f32(f32(s_in * s_w) / s_out)` must be finite, and `|acc| + |bias code|` must stay
    within the accumulator (28 bits at 4-bit weights, else 32) for every input.
    """
    check_in_features(in_features)
    if input_scale is None:
        return
    unit = input_scale * weight_scale.to(torch.float32)
    multiplier = unit if output_scale is None else unit / output_scale
    if not bool(torch.isfinite(multiplier).all()):
        raise ScaleError("s_in * s_w / s_out overflows float32", tensor="weight_scale")
    if bias is None or output_scale is None or weight.group_size is not None:
        return
    codes = torch.round(bias.to(torch.float32) / unit[:, 0]).to(torch.float64).abs()
    limit = accumulator_limit(weight.num_bits)
    if not bool((codes + _largest_sum(weight.num_bits, in_features) <= limit).all()):
        raise AccumulatorError(
            f"a bias of up to {float(codes.max()):.0f} accumulator units can overflow the accumulator, {limit}, "
            f"beside {in_features} inputs of {weight.num_bits} bits (a zero weight scale makes it infinite)",
            tensor="bias",
        )


def _largest_sum(num_bits: int, in_features: int) -> int:
    """The largest dot product of int8 inputs with N-bit weights: all of both at their lowest code."""
    return 128 * (1 << (num_bits - 1)) * in_features


def check_full_length_rows(rows: Tensor, num_bits: int, in_features: int) -> None:
    """Refuse the one weight that overflows at the longest length, 2^17 lowest codes.

    Its products with inputs of -128 add up to 2^31 at 8 bits and to 2^27 at 4: one beyond the accumulator.
    """
    largest, limit = _largest_sum(num_bits, in_features), accumulator_limit(num_bits)
    if largest > limit and bool((rows == 0).all(dim=1).any()):
        raise AccumulatorError(
            f"a channel of {in_features} codes of {-(1 << (num_bits - 1))} can reach {largest}, "
            f"and the accumulator of {num_bits}-bit weights ends at {limit}",
            tensor="weight",
        )
