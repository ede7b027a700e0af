"""Codes to bytes and back, for all widths and all storages.

One layout serves every storage. A row of N-bit codes is a bit stream, least significant bit first: code i, stored as
the unsigned `u = w + 2^(N-1)`, takes bits `i*N .. i*N+N-1`. A row starts on a byte and has `ceil(in * N / 8)` bytes:

    4 bits   byte j = u[2j] | u[2j+1] << 4
    2 bits   byte j = u[4j] | u[4j+1] << 2 | u[4j+2] << 4 | u[4j+3] << 6
    3 bits   byte 0 = u[0] | u[1] << 3 | (u[2] & 3) << 6,  byte 1 = u[2] >> 2 | u[3] << 1 | ...

These *rows* are bytelane's canonical form, in memory and for the kernels. The storages are the same bytes in other
clothes, on a little-endian machine:

- compressed-tensors `pack-quantized`: the rows, zero-padded to whole int32 words (or, by some writers, to the words of
  a multiple of 32 codes);
- compressed-tensors `int-quantized` and Gemma 8-bit: signed int8, the 8-bit rows with the top bit flipped;
- Gemma 2- and 4-bit: the rows themselves.

Eight codes are always N whole bytes, so packing works on blocks of eight codes in an int64, and a width is only a
number.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bytelane.errors import CodeRangeError, PackedShapeError, TensorDtypeError
from bytelane.scheme import Storage, check_bits, code_range, row_bytes

_CHUNK_CODES = 1 << 22
"""Codes (un)packed at a time: bounds the int64 scratch to 32 MiB however large the table is."""


def _require(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise TensorDtypeError(
            f"{what} must be 2-dimensional {dtype}, found {tuple(tensor.shape)} of {tensor.dtype}", tensor=what
        )


def check_codes(codes: Tensor, num_bits: int) -> None:
    """Refuse codes outside `-2^(N-1) .. 2^(N-1)-1`."""
    low, high = code_range(num_bits)
    if num_bits < 8 and codes.numel():
        found_low, found_high = (int(v) for v in torch.aminmax(codes))
        if found_low < low or found_high > high:
            raise CodeRangeError(
                f"{num_bits}-bit codes lie in {low}..{high}, found {found_low}..{found_high}", tensor="codes"
            )


def pack_rows(codes: Tensor, num_bits: int) -> Tensor:
    """Signed codes to canonical rows.

    Args:
        codes: int8 `[rows, in]`.
        num_bits: N, in 2..8.

    Returns:
        uint8 `[rows, ceil(in * N / 8)]`; the bits past the last code are 0.

    Raises:
        CodeRangeError: a code does not fit N bits.
    """
    check_bits(num_bits)
    _require(codes, torch.int8, "codes")
    check_codes(codes, num_bits)
    rows, n = codes.shape
    out = torch.empty(rows, row_bytes(n, num_bits), dtype=torch.uint8, device=codes.device)
    shifts = torch.arange(8, device=codes.device) * num_bits
    byte_shifts = torch.arange(num_bits, device=codes.device) * 8
    step = max(1, _CHUNK_CODES // max(n, 1))
    for start in range(0, rows, step):
        unsigned = codes[start : start + step].to(torch.int64) + (1 << (num_bits - 1))
        blocks = torch.nn.functional.pad(unsigned, (0, -n % 8)).unflatten(1, (-1, 8))
        words = (blocks << shifts).sum(-1, keepdim=True)
        packed = ((words >> byte_shifts) & 0xFF).to(torch.uint8).flatten(1)
        out[start : start + step] = packed[:, : out.shape[1]]
    return out


def unpack_rows(rows: Tensor, num_bits: int, in_features: int) -> Tensor:
    """Canonical rows to signed codes.

    Args:
        rows: uint8 `[rows, ceil(in * N / 8)]`.
        num_bits: N, in 2..8.
        in_features: codes in a row.

    Returns:
        int8 `[rows, in_features]`.

    Raises:
        PackedShapeError: the rows are not as long as the rule says.
    """
    check_bits(num_bits)
    _require(rows, torch.uint8, "rows")
    if rows.shape[1] != row_bytes(in_features, num_bits):
        raise PackedShapeError(
            f"{in_features} codes of {num_bits} bits take {row_bytes(in_features, num_bits)} bytes a row, "
            f"found {rows.shape[1]}",
            tensor="rows",
        )
    if num_bits == 8:
        return (rows ^ 0x80).view(torch.int8)
    out = torch.empty(rows.shape[0], in_features, dtype=torch.int8, device=rows.device)
    shifts = torch.arange(8, device=rows.device) * num_bits
    byte_shifts = torch.arange(num_bits, device=rows.device) * 8
    step = max(1, _CHUNK_CODES // max(in_features, 1))
    for start in range(0, rows.shape[0], step):
        part = torch.nn.functional.pad(rows[start : start + step], (0, -rows.shape[1] % num_bits))
        words = (part.to(torch.int64).unflatten(1, (-1, num_bits)) << byte_shifts).sum(-1, keepdim=True)
        codes = ((words >> shifts) & ((1 << num_bits) - 1)) - (1 << (num_bits - 1))
        out[start : start + step] = codes.flatten(1)[:, :in_features].to(torch.int8)
    return out


def _words(num_codes: int, num_bits: int, *, padded: bool = False) -> int:
    """int32 words in a pack-quantized row: dense, or padded to a multiple of 32 codes."""
    return -(-num_codes // 32) * num_bits if padded else -(-num_codes * num_bits // 32)


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise RuntimeError("bytelane reads int32 words as bytes, which needs a little-endian machine")


def int32_from_rows(rows: Tensor, num_bits: int, in_features: int, *, padded: bool = False) -> Tensor:
    """Canonical rows to pack-quantized words: uint8 `[rows, bytes]` to int32 `[rows, words]`.

    `padded` fills a row to the words of a multiple of 32 codes; without it a row has `ceil(in * N / 32)` words.
    """
    _require_little_endian()
    words = _words(in_features, num_bits, padded=padded)
    return torch.nn.functional.pad(rows, (0, 4 * words - rows.shape[1])).contiguous().view(torch.int32)


def rows_from_int32(packed: Tensor, num_bits: int, in_features: int) -> Tensor:
    """Pack-quantized words to canonical rows, accepting dense and padded rows.

    Raises:
        PackedShapeError: the number of words is neither.
    """
    _require_little_endian()
    check_bits(num_bits)
    _require(packed, torch.int32, "weight_packed")
    dense, padded = _words(in_features, num_bits), _words(in_features, num_bits, padded=True)
    if packed.shape[1] not in (dense, padded):
        raise PackedShapeError(
            f"{in_features} codes of {num_bits} bits take {dense} words a row ({padded} when padded to 32 codes), "
            f"found {packed.shape[1]}",
            tensor="weight_packed",
        )
    return packed.contiguous().view(torch.uint8)[:, : row_bytes(in_features, num_bits)].contiguous()


def pack_int32(codes: Tensor, num_bits: int, *, padded: bool = False) -> Tensor:
    """Signed codes to the `weight_packed` of compressed-tensors' pack-quantized format.

    Args:
        codes: int8 `[out, in]`.
        num_bits: N, in 2..8.
        padded: pad each row to a multiple of 32 codes, as some writers do.

    Returns:
        int32 `[out, ceil(in * N / 32)]`, or `[out, ceil(in / 32) * N]` when padded.

    Raises:
        CodeRangeError: a code does not fit N bits.
    """
    return int32_from_rows(pack_rows(codes, num_bits), num_bits, codes.shape[1], padded=padded)


def unpack_int32(packed: Tensor, num_bits: int, in_features: int) -> Tensor:
    """The inverse of `pack_int32`, for dense and padded rows: int32 words to int8 `[out, in_features]`."""
    return unpack_rows(rows_from_int32(packed, num_bits, in_features), num_bits, in_features)


def rows_from_int8(codes: Tensor, num_bits: int) -> Tensor:
    """Signed int8 codes as stored by int-quantized and 8-bit Gemma to canonical rows."""
    _require(codes, torch.int8, "weight")
    return codes.view(torch.uint8) ^ 0x80 if num_bits == 8 else pack_rows(codes, num_bits)


def store_rows(rows: Tensor, num_bits: int, in_features: int, storage: Storage) -> Tensor:
    """Canonical rows to the tensor a storage holds: int32 words, int8 codes, or the rows themselves."""
    if storage is Storage.PACK_QUANTIZED:
        return int32_from_rows(rows, num_bits, in_features)
    if storage is Storage.INT_QUANTIZED or num_bits == 8:
        return unpack_rows(rows, num_bits, in_features)
    return rows


def stored_shape(out_features: int, in_features: int, num_bits: int, storage: Storage) -> tuple[tuple[int, int], ...]:
    """The shapes a storage's weight tensor may have, the one bytelane writes first."""
    if storage is Storage.PACK_QUANTIZED:
        widths = (_words(in_features, num_bits), _words(in_features, num_bits, padded=True))
        return tuple((out_features, w) for w in dict.fromkeys(widths))
    if storage is Storage.INT_QUANTIZED or num_bits == 8:
        return ((out_features, in_features),)
    return ((out_features, row_bytes(in_features, num_bits)),)
