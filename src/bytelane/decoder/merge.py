"""Projections that read one tensor, as one matrix.

q, k and v read the same normalized stream, and so do gate and up. Where their input scales are equal, the stream is
quantized once; where their widths are equal too, their rows lie in one block of memory and one kernel call runs them
all, each output channel with the scale of its own part. The accumulators are exact and an output depends on its own
channel alone, so every output is the same bits as part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bytelane.layers import QuantLinear
from bytelane.memory import streamed_cat


@dataclass(frozen=True, eq=False)
class Merged:
    """Several projections as one, or one as it is. The tensors are a `QuantLinear`'s, out channels concatenated.

    Attributes:
        packed: uint8 rows `[out, bytes]`.
        weight_scale: float32 `[out, groups]`.
        input_scale: float32 `[]`, or None.
        output_scale: float32 `[]`, or `[out]` where the parts' scales differ, or None.
        bias: float32 `[out]`, or None.
        parts: the layers.
        first: the first output channel of each part.
    """

    packed: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    output_scale: Tensor | None
    bias: Tensor | None
    parts: tuple[QuantLinear, ...]
    first: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Output channels of all parts."""
        return self.packed.shape[0]


def _key(linear: QuantLinear) -> tuple[object, ...]:
    """Layers of one key may run as one."""
    s_in, s_out = linear.input_scale, linear.output_scale
    return (
        linear.num_bits,
        linear.group_size,
        linear.in_features,
        None if s_in is None else float(s_in),
        s_out is None,
        linear.bias is None,
        linear.packed.device,
    )


def merge(linears: Sequence[QuantLinear], *, move: bool = True) -> list[Merged]:
    """Group projections of one input into as few as can be, in their order.

    The rows of a merged group move into one block, and each layer's `packed` and `weight_scale` become views of it:
    nothing is held twice.

    Args:
        linears: layers that are called on the same tensor.
        move: whether rows that do not lie in one block may be moved there; if not, such layers stay single. A graph
            captured earlier reads them where they were.

    Returns:
        The groups; every layer is a part of exactly one.
    """
    groups: dict[tuple[object, ...], list[QuantLinear]] = {}
    for linear in linears:
        # without an input scale there is nothing to share, and the weight-only kernel takes one output scale
        key = (id(linear),) if linear.input_scale is None else _key(linear)
        groups.setdefault(key, []).append(linear)
    joined = [tuple(group) for group in groups.values()]
    if not move:
        joined = [part for group in joined for part in ([group] if _in_one_block(group) else [(one,) for one in group])]
    return [_join(group) for group in joined]


def _in_one_block(parts: Sequence[QuantLinear]) -> bool:
    return all(_adjacent([getattr(part, name) for part in parts]) for name in ("packed", "weight_scale"))


def _join(parts: tuple[QuantLinear, ...]) -> Merged:
    one = parts[0]
    if len(parts) == 1:
        return Merged(one.packed, one.weight_scale, one.input_scale, one.output_scale, one.bias, parts, (0,))
    packed = _block([part.packed for part in parts])
    scale = _block([part.weight_scale for part in parts])
    first, at = [], 0
    for part in parts:
        rows = slice(at, at + part.out_features)
        part._buffers["packed"], part._buffers["weight_scale"] = packed[rows], scale[rows]
        first.append(at)
        at += part.out_features
    outputs = [part.output_scale for part in parts]
    given = [s for s in outputs if s is not None]
    output = torch.cat([s.expand(part.out_features) for s, part in zip(given, parts, strict=True)]) if given else None
    biases = [part.bias for part in parts if part.bias is not None]
    return Merged(packed, scale, one.input_scale, output, torch.cat(biases) if biases else None, parts, tuple(first))


def _block(tensors: list[Tensor]) -> Tensor:
    """Tensors one after the other: the memory they already lie in, where they do."""
    if not _adjacent(tensors):
        return streamed_cat(tensors)
    first = tensors[0]
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _adjacent(tensors: list[Tensor]) -> bool:
    """Whether tensors lie one after the other in one block of memory."""
    first, at = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != at or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return False
        at += tensor.nbytes
    return True
