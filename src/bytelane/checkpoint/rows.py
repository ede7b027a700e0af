"""Canonical rows from and to the tensors a storage holds, one module at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bytelane.checkpoint.layout import ModuleLayout
from bytelane.checkpoint.types import KVScales, QuantizedModule, QuantizedTensors
from bytelane.packing import rows_from_int8, rows_from_int32, store_rows
from bytelane.scheme import Kind, Storage


def clear_padding(rows: Tensor, num_bits: int, in_features: int) -> Tensor:
    """Rows with the bits past the last code set to 0, as the canonical form has them.

    Writers are free to leave anything there. Rows that are clean already are returned as they are, uncopied.
    """
    used = in_features * num_bits % 8
    if not used or not rows.numel() or not bool((rows[:, -1] >> used).any()):
        return rows
    cleared = rows.clone()
    cleared[:, -1] &= (1 << used) - 1
    return cleared


def read_rows(stored: Tensor, layout: ModuleLayout, *, owned: bool = False) -> Tensor:
    """Stored codes as canonical rows; a view wherever the bytes are the same.

    Args:
        stored: the tensor of codes.
        layout: of its module.
        owned: nobody else reads `stored`, so it may become the rows.

    Raises:
        CodeRangeError: int8 codes that do not fit N bits.
        PackedShapeError: a row of another length than the rule says.
    """
    bits, columns = layout.num_bits, layout.shape[1]
    if layout.storage is Storage.PACK_QUANTIZED:
        return clear_padding(rows_from_int32(stored, bits, columns), bits, columns)
    if stored.dtype == torch.int8:
        if owned and bits == 8:
            return stored.view(torch.uint8).bitwise_xor_(0x80)
        return rows_from_int8(stored, bits)
    return clear_padding(stored, bits, columns)


def _zero_if_absent(scale: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float32) if scale is None else scale.reshape(())


def stored_tensors(
    module: QuantizedModule, tensors: QuantizedTensors, storage: Storage
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module as a storage names and shapes them.

    Args:
        module: the module.
        tensors: its tensors in canonical form.
        storage: how its codes shall lie.

    Yields:
        Name and tensor.
    """
    name, bits = module.name, module.scheme.weight.num_bits
    codes = store_rows(tensors.rows, bits, module.shape[1], storage)
    if storage is Storage.GEMMA and module.kind is Kind.EMBEDDING:
        yield f"{name}.embedding_quantized", codes
        yield f"{name}.embedding_scale", tensors.weight_scale.to(torch.float32)
    elif storage is Storage.GEMMA:
        yield f"{name}.weight", codes
        yield f"{name}.weight_scale", tensors.weight_scale.to(torch.float32)
        yield f"{name}.input_activation_scale", _zero_if_absent(tensors.input_scale)
        yield f"{name}.output_activation_scale", _zero_if_absent(tensors.output_scale)
    else:
        packed = storage is Storage.PACK_QUANTIZED
        yield f"{name}.{'weight_packed' if packed else 'weight'}", codes
        yield f"{name}.weight_scale", tensors.weight_scale
        if packed:
            yield f"{name}.weight_shape", torch.tensor(module.shape, dtype=torch.int64)
        if tensors.input_scale is not None:
            yield f"{name}.input_scale", tensors.input_scale.reshape(1)
        if tensors.output_scale is not None:
            yield f"{name}.output_scale", tensors.output_scale.reshape(1)
    if tensors.bias is not None:
        yield f"{name}.bias", tensors.bias


def stored_kv_scales(
    module: str, scales: KVScales, leaves: tuple[str, str], shape: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """The two KV-cache scales of an attention module, float32."""
    for leaf, value in zip(leaves, (scales.k, scales.v), strict=True):
        yield f"{module}.{leaf}", torch.full(shape, value, dtype=torch.float32)
