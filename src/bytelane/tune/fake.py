r"""The quantized layer as training sees it: the integer forward, and gradients through its roundings.

Forward, one scale per channel. The codes are held in float32 and take the formulas of `bytelane.numerics`:

    q = clamp(rne(f32(x) * f32(1 / s_in)))      c = clamp(rne(w / s_w))      acc = q c^T
    o = clamp(rne(acc * r)),  r = s_in * s_w / s_out      y = o * s_out

Products of codes are integers, so `acc` is the exact int32 as long as float32 holds every partial sum, below 2^24: for
every input up to 1024 features at 8 bits, 16384 at 4 and 65536 at 2, and beyond that for all but extreme rows. (On CUDA
the codes are multiplied in bfloat16, which holds -256..256 exactly, and summed in float32.) There the values are those
of the integer layer. Three things differ: with group scales `c * s_w` is multiplied in float, not group by group in
order; without an input scale the layer is a float matmul anyway; and sums beyond 2^24 are rounded. Evaluation uses none
of this: see `bytelane.tune.modules`.

Backward. A rounding is passed straight through, a clamp passes nothing outside its range, and a scale learns where the
clamp should be (LSQ, Esser et al. 2020). With `v = x / s` and `k = clamp(rne(v))`, so that the quantized x is `k s`:

    d(k s)/dx = 1 inside, 0 outside      d(k s)/ds = k - v inside, k outside

Inside, `|k - v| <= 1/2`; outside, `|k| >= 1`, for widths of 2 bits and more. So the one residual `d(k s)/ds` also says
whether a value was inside. Scales are learned as logarithms, which keeps them positive and makes a step a ratio.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bytelane.numerics import QMAX, QMIN

_INSIDE = 0.5
"""The largest residual of a value inside the range."""


def round_scaled(scaled: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes of `x / s`, and the derivative of the quantized value by the scale.

    Args:
        scaled: float32, `x / s`.
        low: the lowest code.
        high: the highest code.

    Returns:
        The codes and the residual, both float32 of the shape of `scaled`.
    """
    nearest = torch.round(scaled)
    codes = torch.clamp(nearest, low, high)
    return codes, torch.where(nearest == codes, codes - scaled, codes)


def inside(residual: Tensor) -> Tensor:
    """Which values the clamp left alone."""
    return residual.abs() <= _INSIDE


def grouped(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 `[rows, columns]` as `[rows, groups, size]`, to meet scales `[rows, groups]`."""
    return weight.reshape(weight.shape[0], scale.shape[1], -1)


def round_weight(weight: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Weight codes and their residual, `[rows, columns]` both.

    Args:
        weight: float32 `[rows, columns]`.
        scale: float32 `[rows, groups]`.
        low: the lowest code.
        high: the highest code.
    """
    codes, residual = round_scaled(grouped(weight, scale) / scale[..., None], low, high)
    return codes.flatten(1), residual.flatten(1)


def _multiply(left: Tensor, right: Tensor, *, exact: bool, fast: bool) -> Tensor:
    """`left @ right` in float32. `exact`: of codes. `fast`: bfloat16 products are good enough."""
    if left.is_cuda and (exact or fast):
        return torch.mm(left.to(torch.bfloat16), right.to(torch.bfloat16), out_dtype=torch.float32)
    return left.to(torch.float32) @ right.to(torch.float32)


# What happens to activations between the matmuls, each one pass over memory once compiled. Nothing here divides, and
# no sum follows a product where that would be seen, so compiling changes no value.


def _codes(x: Tensor, reciprocal: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.clamp(torch.round(x.to(torch.float32) * reciprocal), QMIN, QMAX).to(dtype)


def _requantize(acc: Tensor, ratio: Tensor, output_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, residual = round_scaled(acc * ratio, QMIN, QMAX)
    return (codes * output_scale).to(dtype), residual.to(torch.bfloat16)


def _through_output(gradient: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    gradient = gradient.to(torch.float32)
    return gradient * inside(residual), (gradient * residual).sum()


def _through_input(gradient: Tensor, x: Tensor, reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    _, residual = round_scaled(x.to(torch.float32) * reciprocal, QMIN, QMAX)
    return (gradient * inside(residual)).to(x.dtype), (gradient * residual).sum()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _pointwise(function: Callable[..., Any], x: Tensor, fast: bool) -> Callable[..., Any]:
    """The function, compiled where it is called thousands of times on a GPU."""
    return _compiled(function) if fast and x.is_cuda else function


class _QuantizedLinear(torch.autograd.Function):
    """A linear layer with one scale per channel and a quantized input; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        output_scale: Tensor | None,
        bias: Tensor | None,
        low: int,
        high: int,
        fast: bool,
    ) -> Tensor:
        held = torch.bfloat16 if x.is_cuda else torch.float32
        q = _pointwise(_codes, x, fast)(x, torch.reciprocal(input_scale), held)
        codes, _ = round_weight(weight, weight_scale, low, high)
        acc = _multiply(q, codes.t(), exact=True, fast=fast)
        unit = input_scale * weight_scale[:, 0]
        residual = None
        if output_scale is None:
            y = acc * unit
            y = (y if bias is None else y + bias).to(x.dtype)
        else:
            if bias is not None:
                acc = acc + torch.round(bias / unit)
            y, residual = _pointwise(_requantize, x, fast)(acc, unit / output_scale, output_scale, x.dtype)
        ctx.save_for_backward(x, weight, weight_scale, input_scale, residual)
        ctx.range, ctx.fast, ctx.has_bias, ctx.held = (low, high), fast, bias is not None, held
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, weight_scale, input_scale, residual = ctx.saved_tensors
        gradient, by_output = gradients[0].to(torch.float32), None
        if residual is not None:
            gradient, by_output = _pointwise(_through_output, x, ctx.fast)(gradients[0], residual)
        reciprocal = torch.reciprocal(input_scale)
        codes, by_weight_scale = round_weight(weight, weight_scale, *ctx.range)
        to_input = _multiply(gradient, codes * weight_scale, exact=False, fast=ctx.fast)
        q = _pointwise(_codes, x, ctx.fast)(x, reciprocal, ctx.held)
        to_weight = _multiply(gradient.t(), q, exact=False, fast=ctx.fast) * input_scale
        to_input, by_input = _pointwise(_through_input, x, ctx.fast)(to_input, x, reciprocal)
        return (
            to_input,
            to_weight * inside(by_weight_scale),
            (to_weight * by_weight_scale).sum(1, keepdim=True),
            by_input,
            by_output,
            gradient.sum(0) if ctx.has_bias else None,
            None,
            None,
            None,
        )


class _FakeQuantize(torch.autograd.Function):
    """`clamp(rne(x / s)) * s`, with scales `[rows, groups]` of a matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        codes, residual = round_weight(x, scale, low, high)
        ctx.save_for_backward(residual)
        ctx.groups = scale.shape[1]
        return (grouped(codes, scale) * scale[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        by_scale = (gradients[0] * residual).unflatten(1, (ctx.groups, -1)).sum(-1)
        return gradients[0] * inside(residual), by_scale, None, None


class _FakeQuantizeInt8(torch.autograd.Function):
    """`f32(clamp(rne(x * f32(1 / s)))) * s` of any tensor with one int8 scale, in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        codes, residual = round_scaled(x.to(torch.float32) * torch.reciprocal(scale), QMIN, QMAX)
        ctx.save_for_backward(residual.to(torch.bfloat16))
        return (codes * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        by_scale = (gradients[0].to(torch.float32) * residual).sum()
        return gradients[0] * inside(residual), by_scale


def fake_quantize_rows(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Rows of a weight or a table, quantized and back: float32 `[rows, columns]`, scales `[rows, groups]`."""
    return _FakeQuantize.apply(weight, scale, low, high)  # type: ignore[no-untyped-call, no-any-return]


def fake_quantize_int8(x: Tensor, scale: Tensor) -> Tensor:
    """An activation of any shape with one scale, quantized to int8 and back, in its dtype."""
    return _FakeQuantizeInt8.apply(x, scale)  # type: ignore[no-untyped-call, no-any-return]


def fake_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    bias: Tensor | None,
    low: int,
    high: int,
) -> Tensor:
    """The layer in training: `[..., in]` to `[..., out]` in the dtype of x, differentiable in every argument.

    Args:
        x: float32, bfloat16 or float16.
        weight: float32 `[out, in]`.
        weight_scale: float32 `[out, groups]`, positive.
        input_scale: float32 `[]`, positive, or None.
        output_scale: likewise.
        bias: float32 `[out]` or None.
        low: the lowest weight code.
        high: the highest weight code.
    """
    fast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        if input_scale is not None and weight_scale.shape[1] == 1:
            y = _QuantizedLinear.apply(  # type: ignore[no-untyped-call]
                rows, weight, weight_scale, input_scale, output_scale, bias, low, high, fast
            )
        else:
            if input_scale is not None:
                rows = fake_quantize_int8(rows, input_scale)
            dense = fake_quantize_rows(weight, weight_scale, low, high)
            dtype = torch.bfloat16 if fast else torch.float32
            y = torch.nn.functional.linear(rows.to(dtype), dense.to(dtype), None if bias is None else bias.to(dtype))
            y = (y if output_scale is None else fake_quantize_int8(y.to(torch.float32), output_scale)).to(x.dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
