"""The native CPU kernels between the layers, on torch tensors: norms, rotary embedding, gates and attention.

csrc/cpu/float_ops.hpp and attention.hpp have the formulas. They round to the activation dtype T where transformers' own
modules do; their sums and exponentials are defined by them and not by torch, so a row gives the same bits whatever the
batch, the padding, the pieces of a prompt, the threads or the instruction set.

Every function takes CPU tensors of one activation dtype, float32, bfloat16 or float16, and returns a new one. A tensor
that does not fit raises ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from bytelane import _native
from bytelane.kernels.cpu import dtype_code, isa_code

ActivationName = Literal["gelu_pytorch_tanh", "silu"]

ACTIVATIONS = MappingProxyType({"gelu_pytorch_tanh": 0, "silu": 1})
"""The gate activations, by transformers' names."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm: `T(x * r * w)`, or `T(w * T(x * r))` with `weight_in_t`; `r = 1 / sqrt(mean(x^2) + eps)`.

    Attributes:
        weight: float32 `[width]`, or None for none.
        eps: added to the mean of squares.
        weight_in_t: normalized values are rounded to T before the weight of T multiplies them (Llama's order).
    """

    weight: Tensor | None
    eps: float
    weight_in_t: bool = False

    @property
    def address(self) -> int:
        """Of the weight; 0 for none."""
        return 0 if self.weight is None else self.weight.data_ptr()


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`f32(codes) * scale`, cast to `dtype`.

    Args:
        codes: int8, any shape.
        scale: float32, one element, on the device of `codes`.
        dtype: of the result.
    """
    return codes.to(torch.float32).mul_(scale).to(dtype)


@dataclass(frozen=True, eq=False)
class KeyValues:
    """What attention reads: keys and values `[batch, KV heads, tokens, dim]`, each head's row contiguous.

    Attributes:
        keys: int8 codes, or floats of the activation dtype.
        values: likewise.
        key_scale: float32 `[]`, of codes; None for floats.
        value_scale: likewise.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def floats(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as floats of the activation dtype."""
        pairs = (self.keys, self.key_scale), (self.values, self.value_scale)
        keys, values = (t if scale is None else dequantize(t, scale, dtype) for t, scale in pairs)
        return keys, values

    def places(self) -> tuple[int, ...]:
        """Addresses, scales and strides of keys, then of values, as the native calls take them."""
        return (*_place(self.keys, self.key_scale), *_place(self.values, self.value_scale))


def _place(stored: Tensor, scale: Tensor | None) -> tuple[int, int, int, int, int]:
    batch, head, token, element = stored.stride()
    if element != 1 and stored.shape[-1] > 1:
        raise ValueError(f"the elements of a head must lie together, found strides {stored.stride()}")
    return stored.data_ptr(), 0 if scale is None else scale.data_ptr(), batch, head, token


def _rows(x: Tensor, what: str) -> tuple[int, int]:
    """How many rows, and how far apart, of a tensor whose rows are each contiguous and evenly spaced."""
    width = x.shape[-1]
    if not x.is_cpu:
        raise ValueError(f"{what} must be on the CPU, found {x.device}")
    if x.is_contiguous():
        return x.numel() // max(width, 1), width
    flat = x.flatten(0, -2)
    if flat.data_ptr() != x.data_ptr() or (width > 1 and flat.stride(-1) != 1):
        raise ValueError(f"{what} must have contiguous rows at even distances, found strides {x.stride()}")
    return flat.shape[0], flat.stride(0)


def _check(tensor: Tensor | None, dtype: torch.dtype, count: int, what: str) -> int:
    if tensor is None:
        return 0
    if tensor.dtype is not dtype or tensor.numel() != count or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{what} must be {count} contiguous {dtype} on the CPU, found {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return tensor.data_ptr()


def norm_rows(
    x: Tensor, norm: Norm, *, residual: Tensor | None = None, scalar: Tensor | None = None, isa: str
) -> Tensor:
    """`T(T(residual + norm(x)) * scalar)` of each row.

    Args:
        x: `[..., width]`.
        norm: of the last dimension.
        residual: as `x`, contiguous, added after the norm; None for none.
        scalar: float32 `[]` that holds a value of T; None for none.
        isa: one of `supported_isas()`.

    Returns:
        `[..., width]`, contiguous.
    """
    rows, stride = _rows(x, "x")
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.norm_rows(
        isa_code(isa),
        x.data_ptr(),
        stride,
        dtype_code(x.dtype),
        _check(norm.weight, torch.float32, width, "the norm's weight"),
        norm.weight_in_t,
        norm.eps,
        _check(residual, x.dtype, x.numel(), "the residual"),
        _check(scalar, torch.float32, 1, "the scalar"),
        y.data_ptr(),
        rows,
        width,
        torch.get_num_threads(),
    )
    return y


def head_rows(
    x: Tensor, dim: int, norm: Norm | None = None, angles: tuple[Tensor, Tensor] | None = None, *, isa: str
) -> Tensor:
    """`rotary(norm(x))` of each head of each row.

    Args:
        x: `[..., heads * dim]`; with `angles`, the leading dimensions are `[batch, tokens]` or just rows.
        dim: width of a head.
        norm: of a head; None for none.
        angles: cosines and sines of T, contiguous `[n, dim]` with leading dimensions of any shape; row m of `x` takes
            row `m % n` of them. None for no rotation.
        isa: one of `supported_isas()`.

    Returns:
        As `x`, contiguous.
    """
    rows, stride = _rows(x, "x")
    heads = x.shape[-1] // dim
    if heads * dim != x.shape[-1]:
        raise ValueError(f"heads of {dim} do not divide {x.shape[-1]}")
    cosine = sine = count = 0
    if angles is not None:
        count = angles[0].numel() // dim
        if angles[0].shape[-1] != dim or (count and rows % count):
            raise ValueError(f"{rows} rows of heads of {dim} do not go with angles {tuple(angles[0].shape)}")
        cosine = _check(angles[0], x.dtype, count * dim, "cosines")
        sine = _check(angles[1], x.dtype, count * dim, "sines")
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.head_rows(
        isa_code(isa),
        x.data_ptr(),
        stride,
        dtype_code(x.dtype),
        norm is not None,
        0 if norm is None else _check(norm.weight, torch.float32, dim, "the norm's weight"),
        norm is not None and norm.weight_in_t,
        0.0 if norm is None else norm.eps,
        cosine,
        sine,
        count,
        y.data_ptr(),
        rows,
        heads,
        dim,
        torch.get_num_threads(),
    )
    return y


def gate_rows(gate: Tensor, up: Tensor, activation: ActivationName, *, isa: str) -> Tensor:
    """`T(T(activation(gate)) * up)`, elementwise.

    Args:
        gate: `[..., width]`, rows at even distances.
        up: likewise.
        activation: one of `ACTIVATIONS`.
        isa: one of `supported_isas()`.

    Returns:
        `[..., width]`, contiguous.
    """
    if gate.shape != up.shape or gate.dtype is not up.dtype:
        raise ValueError(f"gate and up must be alike, found {gate.dtype} {tuple(gate.shape)}, {tuple(up.shape)}")
    rows, gate_stride = _rows(gate, "gate")
    _, up_stride = _rows(up, "up")
    y = torch.empty(gate.shape, dtype=gate.dtype)
    _native.gate_rows(
        isa_code(isa),
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        dtype_code(gate.dtype),
        ACTIVATIONS[activation],
        y.data_ptr(),
        rows,
        gate.shape[-1],
        torch.get_num_threads(),
    )
    return y


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, *, isa: str) -> Tensor:
    """`T(x . weight + bias)` of a layer that was never quantized, summed in an order that its width alone fixes.

    Args:
        x: `[..., in]`.
        weight: of T, contiguous `[out, in]`.
        bias: float32 `[out]`, values of T; None for none.
        isa: one of `supported_isas()`.

    Returns:
        `[..., out]`, contiguous.
    """
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}], found {tuple(x.shape)}")
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    _native.dense(
        isa_code(isa),
        _check(x, x.dtype, x.numel(), "x"),
        _check(weight, x.dtype, out_features * in_features, "the weight"),
        _check(bias, torch.float32, out_features, "the bias"),
        y.data_ptr(),
        dtype_code(x.dtype),
        x.numel() // in_features,
        out_features,
        in_features,
        torch.get_num_threads(),
    )
    return y


def store_codes(x: Tensor, scale: Tensor, codes: Tensor, *, isa: str) -> None:
    """Quantize new keys or values into their places in a cache: `clamp(rne(f32(x) * f32(1 / scale)), -128, 127)`.

    Args:
        x: `[batch, heads, tokens, dim]`, any strides but with contiguous rows of `dim`.
        scale: float32 `[]`.
        codes: int8, the shape of `x`, a token right after the other; written.
        isa: one of `supported_isas()`.
    """
    batch, heads, tokens, dim = x.shape
    by_token = x.transpose(1, 2)
    if by_token.stride(-1) != 1 or (heads > 1 and by_token.stride(2) != dim) or not by_token.flatten(0, 1).numel():
        by_token = by_token.contiguous()
    stride = by_token.stride(1)
    if batch > 1 and by_token.stride(0) != tokens * stride:
        by_token, stride = by_token.contiguous(), heads * dim
    if codes.shape != x.shape or codes.dtype is not torch.int8 or (tokens > 1 and codes.stride(2) != dim):
        raise ValueError(f"codes must be int8 {tuple(x.shape)}, found {codes.dtype} {tuple(codes.shape)}")
    if not x.numel():
        return
    _native.store_codes(
        isa_code(isa),
        by_token.data_ptr(),
        stride,
        dtype_code(x.dtype),
        _check(scale, torch.float32, 1, "scale"),
        codes.data_ptr(),
        codes.stride(0),
        codes.stride(1),
        batch,
        tokens,
        heads,
        dim,
    )


def mask_place(mask: Tensor | None, batch: int, queries: int, tokens: int) -> tuple[int, int, int]:
    """Address and strides of a mask `[batch or 1, 1, queries, tokens]` of bools, true where a key is visible."""
    if mask is None:
        return 0, 0, 0
    fits = (
        mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[0] in (1, batch) and mask.shape[2:] == (queries, tokens)
    )
    if mask.dtype is not torch.bool or not fits or (tokens > 1 and mask.stride(3) != 1):
        raise ValueError(
            f"a mask must be bool [{batch} or 1, 1, {queries}, {tokens}] with contiguous rows, found {mask.dtype} "
            f"{tuple(mask.shape)} with strides {mask.stride()}"
        )
    return mask.data_ptr(), 0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(2)


def attention(q: Tensor, stored: KeyValues, mask: Tensor | None, scaling: float, *, isa: str) -> Tensor:
    """Softmax attention over keys and values as a cache holds them.

    Args:
        q: `[batch, queries, heads, dim]`, contiguous.
        stored: the visible keys and values; KV heads divide heads.
        mask: bool `[batch or 1, 1, queries, tokens]`, true where a key is visible; None for causal: query s of S sees
            the first `tokens - S + s + 1` keys.
        scaling: of the scores.
        isa: one of `supported_isas()`.

    Returns:
        `[batch, queries, heads, dim]`. A query that sees no key gives zeros.
    """
    batch, queries, heads, dim = q.shape
    _, kv_heads, tokens, _ = stored.keys.shape
    kept = torch.int8 if stored.key_scale is not None else q.dtype
    for name, tensor in (("keys", stored.keys), ("values", stored.values)):
        if tensor.shape != (batch, kv_heads, tokens, dim) or tensor.dtype is not kept or not tensor.is_cpu:
            raise ValueError(
                f"{name} must be {kept} [{batch}, heads, tokens, {dim}], found {tensor.dtype} {tuple(tensor.shape)}"
            )
    y = torch.empty(q.shape, dtype=q.dtype)
    _native.attention(
        isa_code(isa),
        _check(q, q.dtype, batch * queries * heads * dim, "queries"),
        dtype_code(q.dtype),
        *stored.places(),
        *mask_place(mask, batch, queries, tokens),
        y.data_ptr(),
        scaling,
        batch,
        queries,
        tokens,
        heads,
        kv_heads,
        dim,
        torch.get_num_threads(),
    )
    return y
