"""Codes to bytes and back: every width, every layout, against compressed-tensors' own packing."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelane.checkpoint.rows import clear_padding
from bytelane.errors import CodeRangeError, PackedShapeError, TensorDtypeError, UnsupportedWidthError
from bytelane.packing import (
    int32_from_rows,
    pack_int32,
    pack_rows,
    rows_from_int8,
    rows_from_int32,
    store_rows,
    stored_shape,
    unpack_int32,
    unpack_rows,
)
from bytelane.scheme import Storage, code_range, row_bytes
from checkpoints import pack_bits, random_codes, words

# Releases before dense packing put whole codes in a word, so widths that do not divide 32 lie elsewhere there.
DENSE = pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), 3).shape[1] == 3

widths = st.integers(2, 8)
shapes = st.tuples(st.integers(0, 5), st.integers(1, 140))


def codes_of(shape: tuple[int, int], bits: int, seed: int) -> torch.Tensor:
    return random_codes(shape, bits, torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(widths, shapes, st.integers(0, 2**32))
def test_rows_are_the_documented_bit_stream(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = codes_of(shape, bits, seed)
    rows = pack_rows(codes, bits)
    assert rows.dtype == torch.uint8
    if shape[0]:
        assert torch.equal(rows, pack_bits(codes, bits, row_bytes(shape[1], bits)))
    assert torch.equal(unpack_rows(rows, bits, shape[1]), codes)


@settings(max_examples=80, deadline=None)
@given(widths, shapes, st.booleans(), st.integers(0, 2**32))
def test_int32_round_trip_dense_and_padded(bits: int, shape: tuple[int, int], padded: bool, seed: int) -> None:
    codes = codes_of(shape, bits, seed)
    packed = pack_int32(codes, bits, padded=padded)
    assert packed.shape == (shape[0], words(shape[1], bits, padded=padded))
    assert torch.equal(unpack_int32(packed, bits, shape[1]), codes)
    assert torch.equal(rows_from_int32(packed, bits, shape[1]), pack_rows(codes, bits))


@settings(max_examples=80, deadline=None)
@given(
    widths if DENSE else st.sampled_from((2, 4, 8)),
    st.tuples(st.integers(1, 5), st.integers(1, 140)),
    st.integers(0, 2**32),
)
def test_parity_with_compressed_tensors(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = codes_of(shape, bits, seed)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(unpack_int32(theirs, bits, shape[1]), codes)
    for padded in (False, True):
        ours = pack_int32(codes, bits, padded=padded)
        assert torch.equal(unpack_from_int32(ours, bits, torch.Size(shape)), codes)
    # Their bits past the last code depend on the version; the codes' own bits are equal.
    ours = pack_int32(codes, bits)
    assert ours.shape == theirs.shape
    used = row_bytes(shape[1], bits)
    cleared = [clear_padding(p.view(torch.uint8)[:, :used].contiguous(), bits, shape[1]) for p in (ours, theirs)]
    assert torch.equal(*cleared)


@settings(max_examples=60, deadline=None)
@given(widths, shapes, st.sampled_from(Storage), st.integers(0, 2**32))
def test_every_storage_holds_the_rows(bits: int, shape: tuple[int, int], storage: Storage, seed: int) -> None:
    if storage is Storage.GEMMA and bits not in (2, 4, 8):
        return
    codes = codes_of(shape, bits, seed)
    rows = pack_rows(codes, bits)
    stored = store_rows(rows, bits, shape[1], storage)
    assert tuple(stored.shape) == stored_shape(*shape, bits, storage)[0]
    if stored.dtype == torch.int8:
        assert torch.equal(stored, codes)
        back = rows_from_int8(stored, bits)
    elif stored.dtype == torch.int32:
        back = rows_from_int32(stored, bits, shape[1])
    else:
        back = stored
    assert torch.equal(back, rows)


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_out_of_range_are_refused(bits: int) -> None:
    low, high = code_range(bits)
    for bad in (low - 1, high + 1):
        codes = torch.zeros(3, 9, dtype=torch.int8)
        codes[1, 4] = bad
        with pytest.raises(CodeRangeError, match=f"{bits}-bit"):
            pack_rows(codes, bits)
        with pytest.raises(CodeRangeError):
            rows_from_int8(codes, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 576])
def test_other_word_counts_are_refused(bits: int, columns: int) -> None:
    allowed = {words(columns, bits, padded=p) for p in (False, True)}
    for count in {min(allowed) - 1, max(allowed) + 1} - {0}:
        with pytest.raises(PackedShapeError, match="words a row"):
            rows_from_int32(torch.zeros(2, count, dtype=torch.int32), bits, columns)
    with pytest.raises(PackedShapeError, match="bytes a row"):
        unpack_rows(torch.zeros(2, row_bytes(columns, bits) + 1, dtype=torch.uint8), bits, columns)


def test_widths_and_dtypes_are_checked() -> None:
    for bits in (0, 1, 9):
        with pytest.raises(UnsupportedWidthError):
            pack_rows(torch.zeros(1, 1, dtype=torch.int8), bits)
    with pytest.raises(TensorDtypeError):
        pack_rows(torch.zeros(1, 1, dtype=torch.int32), 4)
    with pytest.raises(TensorDtypeError):
        unpack_int32(torch.zeros(1, 1, dtype=torch.int64), 4, 8)


@pytest.mark.parametrize("bits", [3, 4])
def test_padding_bits_are_cleared_without_copying_clean_rows(bits: int) -> None:
    codes = codes_of((4, 5), bits, 0)
    rows = pack_rows(codes, bits)
    assert clear_padding(rows, bits, 5) is rows
    dirty = rows.clone()
    dirty[2, -1] |= 0x80
    kept = dirty.clone()
    assert torch.equal(clear_padding(dirty, bits, 5), rows)
    assert torch.equal(dirty, kept)


def test_aligned_int32_rows_are_views() -> None:
    packed = pack_int32(codes_of((3, 64), 4, 0), 4)
    rows = rows_from_int32(packed, 4, 64)
    assert rows.data_ptr() == packed.data_ptr()
    assert torch.equal(int32_from_rows(rows, 4, 64), packed)
