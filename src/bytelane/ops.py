"""The operations as `torch.ops.bytelane.*`: schema, shape function, checks, and a default implementation.

| op | computes |
| --- | --- |
| `quantize(x, scale)` | int8 codes of float activations |
| `accumulate(q, weight, num_bits, group_size)` | exact int32 dot products, `[M, out, groups]` |
| `requantize(acc, weight_scale, input_scale, output_scale, bias, dtype)` | outputs from accumulators |
| `linear(x, weight, ...)` | the three above in one call: the layer of `integer` numerics |
| `linear_weight_only(x, weight, ...)` | the layer of `integer` numerics when it has no input scale |
| `linear_emulated(x, weight, ...)` | the layer of `emulated` numerics |
| `embedding(ids, weight, ...)` | gathered, dequantized rows |

`weight` is always the canonical packed rows, uint8 `[out, ceil(in * N / 8)]`; `group_size` 0 means one scale per output
channel; activation scales are float32 tensors of one element, and an absent side is None. The `output_scale` of
`linear` and `requantize` may also be float32 `[out]`, one for each channel: layers that read one tensor, at one input
scale, width and granularity, then run as one call on their concatenated rows, with the bits of each alone. An id that
is not a row of the table raises IndexError on a CPU and gives NaN on CUDA, which does not wait to see it; any other
argument that does not fit raises ValueError. The operations are functional, carry no state, and have no gradient. Every
one of them goes through the table of `bytelane.dispatch`; importing this module registers them, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from bytelane.dispatch import FLOATS, select
from bytelane.scheme import row_bytes

NAMESPACE = "bytelane"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS: dict[str, str] = {
    "quantize": "(Tensor x, Tensor scale) -> Tensor",
    "accumulate": "(Tensor q, Tensor weight, int num_bits, int group_size) -> Tensor",
    "requantize": (
        "(Tensor acc, Tensor weight_scale, Tensor input_scale, Tensor? output_scale, Tensor? bias, ScalarType dtype)"
        " -> Tensor"
    ),
    "linear": (
        "(Tensor x, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? output_scale, Tensor? bias,"
        " int num_bits, int group_size) -> Tensor"
    ),
    "linear_weight_only": (
        "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? output_scale, Tensor? bias, int num_bits) -> Tensor"
    ),
    "linear_emulated": (
        "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? output_scale, Tensor? bias,"
        " int num_bits) -> Tensor"
    ),
    "embedding": (
        "(Tensor ids, Tensor weight, Tensor weight_scale, int num_bits, int embedding_dim, float embed_scale,"
        " ScalarType dtype) -> Tensor"
    ),
}
"""Every operation; the tests iterate this registry."""


# Plain comparisons, and messages made only when one fails: these run before every layer of every token.


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _check_floats(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        _refuse(f"x must be float32, bfloat16 or float16, found {x.dtype}")


def _check_weight(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, num_bits: int) -> None:
    in_features, shape, scale_shape = x.shape[-1], weight.shape, weight_scale.shape
    if x.dtype not in FLOATS:
        _refuse(f"x must be float32, bfloat16 or float16, found {x.dtype}")
    if weight.dtype is not torch.uint8 or len(shape) != 2 or shape[1] != row_bytes(in_features, num_bits):
        _refuse(
            f"{in_features} inputs of {num_bits} bits need uint8 rows of {row_bytes(in_features, num_bits)} bytes, "
            f"found {tuple(shape)} of {weight.dtype}"
        )
    if weight_scale.dtype is not torch.float32 or len(scale_shape) != 2 or scale_shape[0] != shape[0]:
        _refuse(
            f"weight_scale must be float32 [{shape[0]}, groups], found {tuple(scale_shape)} of {weight_scale.dtype}"
        )
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (shape[0],)):
        _refuse(f"bias must be float32 [{shape[0]}], found {tuple(bias.shape)} of {bias.dtype}")


def _check_groups(in_features: int, weight_scale: Tensor, group_size: int) -> None:
    groups = in_features // group_size if group_size else 1
    if weight_scale.shape[1] != groups or (group_size and groups * group_size != in_features):
        _refuse(f"groups of {group_size} in {in_features} inputs do not fit {weight_scale.shape[1]} scales a channel")


def _group_size(in_features: int, weight_scale: Tensor) -> int:
    """What the number of scales in a row says: 0 for one."""
    groups = weight_scale.shape[1]
    if groups == 1:
        return 0
    if groups == 0 or in_features % groups or not in_features:
        _refuse(f"{groups} scales a row do not divide {in_features} codes")
    return in_features // groups


def _check_activation_scale(scale: Tensor | None, what: str) -> None:
    if scale is not None and (scale.dtype is not torch.float32 or scale.numel() != 1):
        _refuse(f"{what} must be one float32, found {tuple(scale.shape)} of {scale.dtype}")


def _check_output_scale(scale: Tensor | None, out_features: int) -> None:
    if scale is not None and (
        scale.dtype is not torch.float32 or (scale.numel() != 1 and scale.shape != (out_features,))
    ):
        _refuse(
            f"output_scale must be one float32 or [{out_features}] of them, found {tuple(scale.shape)} of {scale.dtype}"
        )


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else math.prod(x.shape[:-1])


def _quantize(x: Tensor, scale: Tensor) -> Tensor:
    _check_floats(x)
    _check_activation_scale(scale, "scale")
    return select("quantize", x.device.type, x.dtype, 8, 0, 1).run(x, scale)


def _quantize_fake(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


def _accumulate(q: Tensor, weight: Tensor, num_bits: int, group_size: int) -> Tensor:
    if q.dtype != torch.int8 or q.dim() != 2:
        _refuse(f"q must be int8 [M, in], found {q.dtype} {tuple(q.shape)}")
    if weight.dim() != 2 or weight.shape[1] != row_bytes(q.shape[1], num_bits):
        _refuse(f"{q.shape[1]} inputs of {num_bits} bits do not fit rows of shape {tuple(weight.shape)}")
    if group_size and q.shape[1] % group_size:
        _refuse(f"{group_size} does not divide {q.shape[1]}")
    kernel = select("accumulate", q.device.type, q.dtype, num_bits, group_size, q.shape[0])
    return kernel.run(q, weight, num_bits, group_size)


def _accumulate_fake(q: Tensor, weight: Tensor, num_bits: int, group_size: int) -> Tensor:
    groups = q.shape[1] // group_size if group_size else 1
    return q.new_empty(q.shape[0], weight.shape[0], groups, dtype=torch.int32)


def _requantize(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if acc.dtype != torch.int32 or acc.dim() != 3 or acc.shape[1:] != weight_scale.shape:
        _refuse(f"acc must be int32 [M, {', '.join(map(str, weight_scale.shape))}], found {tuple(acc.shape)}")
    _check_activation_scale(input_scale, "input_scale")
    _check_output_scale(output_scale, acc.shape[1])
    kernel = select("requantize", acc.device.type, dtype, 8, 0, acc.shape[0])
    return kernel.run(acc, weight_scale, input_scale, output_scale, bias, dtype)


def _requantize_fake(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return acc.new_empty(acc.shape[0], acc.shape[1], dtype=dtype)


def _linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
) -> Tensor:
    _check_weight(x, weight, weight_scale, bias, num_bits)
    _check_groups(x.shape[-1], weight_scale, group_size)
    _check_activation_scale(input_scale, "input_scale")
    _check_output_scale(output_scale, weight.shape[0])
    kernel = select("linear", x.device.type, x.dtype, num_bits, group_size, _rows(x))
    return kernel.run(x, weight, weight_scale, input_scale, output_scale, bias, num_bits, group_size)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, output_scale: Tensor | None, bias: Tensor | None, num_bits: int
) -> Tensor:
    _check_weight(x, weight, weight_scale, bias, num_bits)
    _check_activation_scale(output_scale, "output_scale")
    group_size = _group_size(x.shape[-1], weight_scale)
    kernel = select("linear_weight_only", x.device.type, x.dtype, num_bits, group_size, _rows(x))
    return kernel.run(x, weight, weight_scale, output_scale, bias, num_bits)


def _linear_weight_only_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, output_scale: Tensor | None, bias: Tensor | None, num_bits: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_emulated(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
) -> Tensor:
    _check_weight(x, weight, weight_scale, bias, num_bits)
    _check_activation_scale(input_scale, "input_scale")
    _check_activation_scale(output_scale, "output_scale")
    group_size = _group_size(x.shape[-1], weight_scale)
    kernel = select("linear_emulated", x.device.type, x.dtype, num_bits, group_size, _rows(x))
    return kernel.run(x, weight, weight_scale, input_scale, output_scale, bias, num_bits)


def _linear_emulated_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _embedding(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    num_bits: int,
    embedding_dim: int,
    embed_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    if ids.dtype != torch.int64 and ids.dtype != torch.int32:
        _refuse(f"ids must be int64 or int32, found {ids.dtype}")
    if weight.dtype is not torch.uint8 or weight.dim() != 2 or weight.shape[1] != row_bytes(embedding_dim, num_bits):
        _refuse(f"{embedding_dim} codes of {num_bits} bits do not fit rows {tuple(weight.shape)} of {weight.dtype}")
    if weight_scale.dtype is not torch.float32 or weight_scale.dim() != 2 or weight_scale.shape[0] != weight.shape[0]:
        _refuse(
            f"weight_scale must be float32 [{weight.shape[0]}, groups], found {tuple(weight_scale.shape)} of "
            f"{weight_scale.dtype}"
        )
    if dtype not in FLOATS:
        _refuse(f"dtype must be float32, bfloat16 or float16, found {dtype}")
    group_size = _group_size(embedding_dim, weight_scale)
    kernel = select("embedding", ids.device.type, dtype, num_bits, group_size, ids.numel())
    return kernel.run(ids, weight, weight_scale, num_bits, embedding_dim, embed_scale, dtype)


def _embedding_fake(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    num_bits: int,
    embedding_dim: int,
    embed_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(*ids.shape, embedding_dim, dtype=dtype, device=ids.device)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "quantize": (_quantize, _quantize_fake),
    "accumulate": (_accumulate, _accumulate_fake),
    "requantize": (_requantize, _requantize_fake),
    "linear": (_linear, _linear_fake),
    "linear_weight_only": (_linear_weight_only, _linear_weight_only_fake),
    "linear_emulated": (_linear_emulated, _linear_emulated_fake),
    "embedding": (_embedding, _embedding_fake),
}

for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _implementation, _fake = _IMPLEMENTATIONS[_name]
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)
