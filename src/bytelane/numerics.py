"""The executable specification of both numerics, in plain torch: obvious, slow, and right on any device.

`integer` is what the phone computes. All arithmetic is IEEE float32 with one rounding per operation (no fused
multiply-add), `rne` rounds half to even, and the accumulator is exact:

    q[m,k]   = clamp(rne(f32(x[m,k]) * f32(1 / s_in)), -128, 127)          NaN and +inf give 127, -inf gives -128
    acc[m,n] = sum_k q[m,k] * w[n,k]                                       int32, exact
    r[n]     = f32(f32(s_in * s_w[n]) / s_out)
    o[m,n]   = clamp(rne(f32(acc[m,n]) * r[n]), -128, 127)
    y[m,n]   = f32(o[m,n]) * s_out, cast to the dtype of x

- Without an output scale: `y = f32(acc) * f32(s_in * s_w[n])`, then the float bias is added, then the cast.
- `s_out` is one scale, or one per output channel: layers that read one tensor run as one, each with its own scale,
  and every output is the same bits as apart.
- With a bias and an output scale the bias is an int32 in units of the accumulator:
  `b[n] = rne(bias[n] / f32(s_in * s_w[n]))` joins `acc` before the requantization. `acc + b` never leaves the vendor's
  accumulator, which has 28 bits at 4-bit weights and 32 at others: see `scheme.accumulator_limit`.
- Group scales: each group g has its own exact `acc` and its own `r[n,g]`. The products `f32(acc_g) * r[n,g]` are
  added in float32 in ascending g, and the sum takes the place of `f32(acc) * r[n]`. The order is part of the
  definition, so the result depends on no tile, thread or batch size. A bias joins that sum last, as
  `f32(bias[n] / s_out)` with an output scale and as `bias[n]` without one.
- Without an input scale there are no integer inputs: the layer is a weight-only matmul in the dtype of x, followed by
  the output step of `emulated`.

`emulated` is what vLLM and Hugging Face compute: a float fake quantization around a weight-only matmul, every
operation rounded to the activation dtype T:

    fq(x, s) = clamp(round_half_even(x / s), -128, 127) * s               s cast to T first
    y        = fq(linear(fq(x, s_in), w * s_w, bias), s_out)

It drifts from the integers (in bfloat16, an eighth of the input codes differ); it exists for parity with those
runtimes. A scale of exactly 0 means "not calibrated": that side is not quantized.

The formulas were found by probing LiteRT 2.3.0 with its XNNPACK delegate; `tests/test_litert.py` repeats the probe.
Its kernels for SSE, AVX2, AVX512-VNNI and Arm (with and without dot products) all compute them; only a NaN input, which
is 127 here and on x86-64, is 0 on Arm.
"""

from __future__ import annotations

import torch
from torch import Tensor

QMIN, QMAX = -128, 127


def _round_to_int8(scaled: Tensor) -> Tensor:
    """`clamp(rne(v), -128, 127)` as int8; NaN gives 127. Through int8, so that no negative zero comes back out."""
    scaled = torch.where(torch.isnan(scaled), QMAX, scaled)
    return torch.clamp(torch.round(scaled), QMIN, QMAX).to(torch.int8)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Float activations to int8 codes.

    Args:
        x: float32, bfloat16 or float16, any shape.
        scale: `s_in`, float32, one element, positive.

    Returns:
        int8 codes of the shape of `x`.
    """
    return _round_to_int8(x.to(torch.float32) * torch.reciprocal(scale.to(torch.float32)).reshape(()))


def accumulate(q: Tensor, codes: Tensor, group_size: int = 0) -> Tensor:
    """Exact integer dot products, one for each group of inputs.

    float64 holds every partial sum exactly (all are integers below 2^53) in any order, so this is the int32 result on
    every device, including those that have no integer matmul.

    Args:
        q: int8 `[M, in]`.
        codes: int8 `[out, in]`.
        group_size: inputs in a group; 0 for one group of all inputs.

    Returns:
        int32 `[M, out, groups]`.
    """
    m, in_features = q.shape
    size = group_size or in_features
    groups = in_features // group_size if group_size else 1
    left = q.to(torch.float64).reshape(m, groups, size).transpose(0, 1)
    right = codes.to(torch.float64).reshape(codes.shape[0], groups, size).permute(1, 2, 0)
    return torch.bmm(left, right).permute(1, 2, 0).to(torch.int32)


def bias_codes(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The int32 bias of a layer with one scale per channel: `rne(bias / f32(s_in * s_w))`, int32 `[out]`.

    A bias that could take `acc + b` out of the accumulator has no value here: the vendor's kernels answer it each in
    their own way. Layers refuse it when they are built.
    """
    unit = input_scale.to(torch.float32).reshape(()) * weight_scale.to(torch.float32)[:, 0]
    return torch.round(bias.to(torch.float32) / unit).to(torch.int32)


def requantize(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Accumulators to outputs: scale, add the bias, round to int8 and back where there is an output scale.

    Args:
        acc: int32 `[M, out, groups]`.
        weight_scale: float32 `[out, groups]`.
        input_scale: float32, one element.
        output_scale: float32, one element or `[out]`, or None for an output that is not quantized.
        bias: float `[out]` or None.
        dtype: of the result.

    Returns:
        `[M, out]` in `dtype`.
    """
    groups = acc.shape[2]
    scale = input_scale.to(torch.float32).reshape(()) * weight_scale.to(torch.float32)
    s_out = None if output_scale is None else output_scale.to(torch.float32).reshape(-1)  # broadcasts over channels
    if s_out is not None:
        scale = scale / s_out[:, None]
        if bias is not None and groups == 1:
            acc = acc + bias_codes(bias, input_scale, weight_scale)[:, None]
    total = acc[:, :, 0].to(torch.float32) * scale[:, 0]
    for g in range(1, groups):
        total = total + acc[:, :, g].to(torch.float32) * scale[:, g]
    if s_out is None:
        return (total if bias is None else total + bias.to(torch.float32)).to(dtype)
    if bias is not None and groups > 1:
        total = total + bias.to(torch.float32) / s_out
    return (_round_to_int8(total).to(torch.float32) * s_out).to(dtype)


def linear_integer(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """The `integer` layer.

    Args:
        x: `[..., in]`, float32, bfloat16 or float16.
        codes: int8 `[out, in]`.
        weight_scale: `[out, groups]`.
        input_scale: float32, one element, positive.
        output_scale: float32, one element or `[out]`, positive; None leaves the output unquantized.
        bias: float `[out]` or None.
        group_size: inputs in a group; 0 for one scale per output channel.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    q = quantize(x.reshape(-1, x.shape[-1]), input_scale)
    acc = accumulate(q, codes, group_size)
    y = requantize(acc, weight_scale, input_scale, output_scale, bias, x.dtype)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """`fq(x, s)` of `emulated`: quantize and dequantize in the dtype of `x`, one rounding per operation."""
    s = scale.to(x.dtype).reshape(())
    return torch.clamp(torch.round(x / s), QMIN, QMAX) * s


def dequantize_weight(codes: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`w * s_w` in `dtype`: int8 `[rows, in]` and scales `[rows, groups]` to float `[rows, in]`."""
    groups = weight_scale.shape[-1]
    grouped = codes.to(dtype).reshape(*codes.shape[:-1], groups, codes.shape[-1] // groups)
    return (grouped * weight_scale.to(dtype).unsqueeze(-1)).reshape(codes.shape)


def linear_emulated(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The `emulated` layer; without an input scale also the `integer` layer's weight-only form.

    Shapes are those of `linear_integer`; every operation rounds to the dtype of `x`.
    """
    if input_scale is not None:
        x = fake_quantize(x, input_scale)
    weight = dequantize_weight(codes, weight_scale, x.dtype)
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if output_scale is None else fake_quantize(y, output_scale)


def embedding(codes: Tensor, weight_scale: Tensor, embed_scale: float, dtype: torch.dtype) -> Tensor:
    """Gathered embedding rows: int8 `[..., dim]` and scales `[..., groups]` to float `[..., dim]`.

    `embed_scale` is the architecture's own factor (Gemma multiplies its embeddings by sqrt(hidden)); it is applied
    after the dequantization, in `dtype`.
    """
    return dequantize_weight(codes, weight_scale, dtype) * embed_scale
