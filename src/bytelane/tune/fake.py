r"""The quantized layer as training sees it: the integer forward, and gradients through its roundings.

Forward, one scale per channel. The codes are held in float32 and take the formulas of `bytelane.numerics`:

    q = clamp(rne(f32(x) * f32(1 / s_in)))      c = clamp(rne(w * f32(1 / s_w)))      acc = q c^T
    o = clamp(rne(acc * r)),  r = s_in * s_w / s_out      y = o * s_out

Products of codes are integers, so `acc` is the exact int32 as long as float32 holds every partial sum, below 2^24: for
every input up to 1024 features at 8 bits, 16384 at 4 and 65536 at 2, and beyond that for all but extreme rows. (On CUDA
the codes are multiplied in bfloat16, which holds -256..256 exactly, and summed in float32.) There the values are those
of the integer layer. Three things differ: with group scales `q` is multiplied by `c * s_w` in float (in bfloat16 under
autocast on CUDA), not group by group in order; without an input scale the layer is a float matmul anyway; and sums
beyond 2^24 are rounded. Evaluation uses none of this: see `bytelane.tune.modules`.

Backward. A rounding is passed straight through, a clamp passes nothing outside its range, and a scale learns where the
clamp should be (LSQ, Esser et al. 2020). With `v = x / s` and `k = clamp(rne(v))`, so that the quantized x is `k s`:

    d(k s)/dx = 1 inside, 0 outside      d(k s)/ds = k - v inside, k outside

Inside, `|k - v| <= 1/2`; outside, `|k| >= 1`, for widths of 2 bits and more. So the one residual `d(k s)/ds` also says
whether a value was inside. Scales are learned as logarithms, which keeps them positive and makes a step a ratio.

The functions between the matmuls are written here in torch. Under autocast on CUDA `bytelane.tune.triton_fake` has
their equals of one pass over memory each, and what follows a layer gets its output in autocast's dtype, as from torch's
own linear layer.
"""

from __future__ import annotations

from types import ModuleType
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
    codes, residual = round_scaled(grouped(weight, scale) * torch.reciprocal(scale)[..., None], low, high)
    return codes.flatten(1), residual.flatten(1)


# What happens between the matmuls. Their equals in Triton: `bytelane.tune.triton_fake`.


def input_codes(x: Tensor, reciprocal: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Codes of an activation in `dtype`, which holds them exactly."""
    return torch.clamp(torch.round(x.to(torch.float32) * reciprocal), low, high).to(dtype)


def requantize(
    acc: Tensor, ratio: Tensor, bias: Tensor | None, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Float32 sums `[m, n]` to quantized outputs in `dtype`, and their residual in bfloat16.

    Args:
        acc: sums.
        ratio: what a channel's sums are multiplied by to be output codes, `[n]`.
        bias: added before that, `[n]`, or None.
        scale: of the output.
        low: the lowest code.
        high: the highest code.
        dtype: of the output.
    """
    codes, residual = round_scaled((acc if bias is None else acc + bias) * ratio, low, high)
    return (codes * scale).to(dtype), residual.to(torch.bfloat16)


def through_output(gradient: Tensor, residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient before the output's rounding, in `dtype`, and by the output's scale."""
    gradient = gradient.to(torch.float32)
    return (gradient * inside(residual)).to(dtype), (gradient * residual).sum()


def through_input(gradient: Tensor, x: Tensor, reciprocal: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The gradient before the input's rounding, in the dtype of x, and by the input's scale."""
    gradient = gradient.to(torch.float32)
    _, residual = round_scaled(x.to(torch.float32) * reciprocal, low, high)
    return (gradient * inside(residual)).to(x.dtype), (gradient * residual).sum()


def weight_operand(weight: Tensor, scale: Tensor, low: int, high: int, *, scaled: bool, dtype: torch.dtype) -> Tensor:
    """Weight codes, or `scaled` the values they stand for, in `dtype`; scales `[rows, 1]`."""
    codes, _ = round_weight(weight, scale, low, high)
    return (codes * scale if scaled else codes).to(dtype)


def through_weight(
    gradient: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """`gradient * factor` before the weight's rounding, float32, and by its scales `[rows, 1]`."""
    gradient = gradient * factor
    _, residual = round_weight(weight, scale, low, high)
    return gradient * inside(residual), (gradient * residual).sum(1, keepdim=True)


def _weight_operand(
    between: ModuleType, weight: Tensor, scale: Tensor, low: int, high: int, *, scaled: bool, dtype: torch.dtype
) -> Tensor:
    """`weight_operand` with scales `[rows, groups]`: a group is a row by itself."""
    made: Tensor = between.weight_operand(
        weight.reshape(scale.numel(), -1), scale.reshape(-1, 1), low, high, scaled=scaled, dtype=dtype
    )
    return made.reshape(weight.shape)


def _through_weight(
    between: ModuleType, gradient: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """`through_weight` with scales `[rows, groups]`."""
    rows = (t.reshape(scale.numel(), -1) for t in (gradient, weight))
    to_weight, by_scale = between.through_weight(*rows, scale.reshape(-1, 1), factor, low, high)
    return to_weight.reshape(weight.shape), by_scale.reshape(scale.shape)


def _codes_dtype(x: Tensor, log_weight_scale: Tensor, fast: bool) -> torch.dtype:
    """In which an input's codes meet the weight: bfloat16 on CUDA, but not where groups make the weight a float."""
    return torch.bfloat16 if x.is_cuda and (fast or log_weight_scale.shape[1] == 1) else torch.float32


def _between(x: Tensor, fast: bool) -> ModuleType:
    """Where the functions between the matmuls come from."""
    if fast and x.is_cuda:
        from bytelane.tune import triton_fake

        return triton_fake
    import bytelane.tune.fake

    return bytelane.tune.fake


def _sums(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in float32, of operands of one dtype."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(torch.float32) @ right.to(torch.float32)


def _nothing(like: Tensor) -> Tensor:
    """What an operation returns where it has nothing to return; each a tensor of its own."""
    return like.new_empty(0, dtype=torch.float32)


def _exp(log: Tensor | None) -> Tensor | None:
    return None if log is None else log.exp()


@torch.library.custom_op("bytelane_tune::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    log_weight_scale: Tensor,
    log_input_scale: Tensor | None,
    log_output_scale: Tensor | None,
    bias: Tensor | None,
    low: int,
    high: int,
    dtype: torch.dtype,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer: its output, and for the backward pass its input's codes and its residual.

    An operation of its own, so that `torch.compile` fuses what lies between layers and leaves the layers' bits alone.
    """
    between = _between(x, fast)
    s_w, s_in, s_out = log_weight_scale.exp(), _exp(log_input_scale), _exp(log_output_scale)
    with torch.autocast(x.device.type, enabled=False):
        if s_in is None:
            held = torch.bfloat16 if fast else torch.float32
            codes, operand = _nothing(x), x.to(held)
            dense = _weight_operand(between, weight, s_w, low, high, scaled=True, dtype=held)
            if s_out is None:
                y = torch.nn.functional.linear(operand, dense, None if bias is None else bias.to(held))
                return y.to(dtype), codes, _nothing(x)
            unit, added = torch.ones_like(s_w[:, 0]), bias
        else:
            held, groups = _codes_dtype(x, log_weight_scale, fast), log_weight_scale.shape[1] > 1
            codes = operand = between.input_codes(x, torch.reciprocal(s_in), QMIN, QMAX, held)
            dense = _weight_operand(between, weight, s_w, low, high, scaled=groups, dtype=held)
            unit = s_in * (torch.ones_like(s_w[:, 0]) if groups else s_w[:, 0])
            added = None if bias is None else bias / unit if groups else torch.round(bias / unit)
        acc = _sums(operand, dense.t())
        if s_out is None:
            y = acc * unit
            return (y if bias is None else y + bias).to(dtype), codes, _nothing(x)
        y, residual = between.requantize(acc, unit / s_out, added, s_out, QMIN, QMAX, dtype)
        return y, codes, residual


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    log_weight_scale: Tensor,
    log_input_scale: Tensor | None,
    log_output_scale: Tensor | None,
    bias: Tensor | None,
    low: int,
    high: int,
    dtype: torch.dtype,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    held = _codes_dtype(x, log_weight_scale, fast)
    return (
        y,
        _nothing(x) if log_input_scale is None else torch.empty_like(x, dtype=held),
        _nothing(x) if log_output_scale is None else torch.empty_like(y, dtype=torch.bfloat16),
    )


@torch.library.custom_op("bytelane_tune::linear_backward", mutates_args=())
def _linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    log_weight_scale: Tensor,
    log_input_scale: Tensor | None,
    log_output_scale: Tensor | None,
    codes: Tensor,
    residual: Tensor,
    low: int,
    high: int,
    fast: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, the weight, the logarithms of the three scales, and the bias; empty where there is none."""
    between = _between(x, fast)
    s_w, s_in, s_out = log_weight_scale.exp(), _exp(log_input_scale), _exp(log_output_scale)
    held = torch.bfloat16 if fast else torch.float32
    by_input, by_output, by_bias = _nothing(x), _nothing(x), _nothing(x)
    with torch.autocast(x.device.type, enabled=False):
        if s_out is not None:
            gradient, by_output = between.through_output(gradient, residual, held)
            by_output = by_output * s_out
        gradient = gradient.to(held)
        if has_bias:
            by_bias = gradient.sum(0, dtype=torch.float32)
        dense = _weight_operand(between, weight, s_w, low, high, scaled=True, dtype=held)
        to_input = gradient @ dense
        operand = x if s_in is None else codes
        factor = torch.ones_like(s_w[0, 0]) if s_in is None else s_in
        to_weight, by_weight_scale = _through_weight(
            between, _sums(gradient.t(), operand.to(held)), weight, s_w, factor, low, high
        )
        if s_in is None:
            to_input = to_input.to(x.dtype)
        else:
            to_input, by_input = between.through_input(to_input, x, torch.reciprocal(s_in), QMIN, QMAX)
            by_input = by_input * s_in
    return to_input, to_weight, by_weight_scale * s_w, by_input, by_output, by_bias


@_linear_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    log_weight_scale: Tensor,
    log_input_scale: Tensor | None,
    log_output_scale: Tensor | None,
    codes: Tensor,
    residual: Tensor,
    low: int,
    high: int,
    fast: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(log_weight_scale),
        _nothing(x) if log_input_scale is None else torch.empty_like(log_input_scale),
        _nothing(x) if log_output_scale is None else torch.empty_like(log_output_scale),
        weight.new_empty(weight.shape[0]) if has_bias else _nothing(x),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, log_weight_scale, log_input_scale, log_output_scale, bias, low, high, _, fast = inputs
    _, codes, residual = output
    ctx.save_for_backward(x, weight, log_weight_scale, log_input_scale, log_output_scale, codes, residual)
    ctx.mark_non_differentiable(codes, residual)
    ctx.range, ctx.fast, ctx.has_bias = (low, high), fast, bias is not None


def _differentiate(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, log_weight_scale, log_input_scale, log_output_scale, codes, residual = ctx.saved_tensors
    found = _linear_backward(
        gradient.contiguous(),
        x,
        weight,
        log_weight_scale,
        log_input_scale,
        log_output_scale,
        codes,
        residual,
        *ctx.range,
        ctx.fast,
        ctx.has_bias,
    )
    to_input, to_weight, by_weight_scale, by_input, by_output, by_bias = found
    return (
        to_input,
        to_weight,
        by_weight_scale,
        None if log_input_scale is None else by_input,
        None if log_output_scale is None else by_output,
        by_bias if ctx.has_bias else None,
        None,
        None,
        None,
        None,
    )


_linear.register_autograd(_differentiate, setup_context=_save)


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
    log_weight_scale: Tensor,
    log_input_scale: Tensor | None,
    log_output_scale: Tensor | None,
    bias: Tensor | None,
    low: int,
    high: int,
) -> Tensor:
    """The layer in training, differentiable in every tensor.

    Args:
        x: float32, bfloat16 or float16 `[..., in]`.
        weight: float32 `[out, in]`.
        log_weight_scale: float32 `[out, groups]`, the logarithms of the scales.
        log_input_scale: float32 `[]`, likewise, or None.
        log_output_scale: likewise.
        bias: float32 `[out]` or None.
        low: the lowest weight code.
        high: the highest weight code.

    Returns:
        `[..., out]` in the dtype of x, or under autocast in autocast's.
    """
    fast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if fast else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    arguments = (rows, weight, log_weight_scale, log_input_scale, log_output_scale, bias, low, high, dtype, fast)
    y: Tensor = _linear(*arguments)[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])
