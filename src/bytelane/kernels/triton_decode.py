"""One to four rows of an integer layer, in one launch of byte dots: the weight's bytes are all that costs.

    word w of a row, N = 4     codes 8w .. 8w + 7, two a byte: plane 0 in the low nibbles, plane 1 in the high ones
    weight   plane p of the word: four codes in four bytes, times 16 (triton_codes.py)
    x        its codes 8w + p, 8w + p + 2, 8w + p + 4, 8w + p + 6 as the four bytes of another word
    dp4a     four products and their sum in one instruction, exact int32

Tensor cores take at least eight rows, want both operands in their own order, and shared memory between; at one row that
is all overhead. Here a thread loads 16 bytes of each of BN rows of the weight, straight into registers, and dots them
where they are. What a program makes once, the words of x, serves all its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bytelane.kernels.triton_codes import (
    INTERPRETED,
    channel_terms,
    finish,
    load_channels,
    load_output_scale,
    prefetch_rows,
    quantize_codes,
    rounded_to,
)


@triton.jit
def _byte(word, j: tl.constexpr):
    """Byte j of int32 words, as a signed number."""
    return (word << (24 - 8 * j)) >> 24


@triton.jit
def dot_bytes(a, b, acc):
    """`acc` plus the four products of the signed bytes of `a` and `b`, all int32."""
    if INTERPRETED:
        for j in tl.static_range(4):
            acc += _byte(a, j) * _byte(b, j)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def plane_of_words(words, P: tl.constexpr, BITS: tl.constexpr):
    """Plane P of int32 words of packed codes: four signed bytes a word, times `2^(8 - BITS)`."""
    LEFT: tl.constexpr = 8 - BITS - BITS * P
    MASK: tl.constexpr = (256 - (1 << (8 - BITS))) * 0x01010101 - (1 << 32)
    FLIP: tl.constexpr = 0x80808080 - (1 << 32)
    return ((words << LEFT) & MASK) ^ FLIP


@triton.jit
def words_of_codes(codes, BW: tl.constexpr, PLANES: tl.constexpr):
    """Codes `[BW * 4 * PLANES]` to a tuple of planes `[BW]`, four codes in the bytes of an int32."""
    place = (tl.arange(0, BW * 4 * PLANES) // PLANES) % 4
    placed = (codes.to(tl.int32) & 0xFF) << (place * 8)
    words = tl.sum(tl.reshape(placed, (BW, 4, PLANES)), 1)
    if PLANES == 1:
        return (tl.reshape(words, (BW,)),)
    elif PLANES == 2:
        return tl.split(words)
    else:
        even, odd = tl.split(tl.reshape(words, (BW, 2, 2)))
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        return (p0, p1, p2, p3)


@triton.jit
def load_words(at, first, row_words, BW: tl.constexpr):
    """BW words of each weight row from word `first` on."""
    words = first + tl.arange(0, BW)[None, :]
    return tl.load(at + words, mask=words < row_words, other=0)


@triton.jit
def load_rows(x, first, rows, in_features, BM: tl.constexpr, BW: tl.constexpr, PLANES: tl.constexpr):
    """The activations that meet BW words from word `first` on, a tensor for each row.

    Activations past K, and of rows past M, are 0, whatever they meet.
    """
    k = first * (4 * PLANES) + tl.arange(0, BW * 4 * PLANES)
    floats = ()
    for m in tl.static_range(BM):
        end = tl.where(m < rows, in_features, 0)
        floats = floats + (tl.load(x + m * in_features + k, mask=k < end, other=0.0),)  # noqa: RUF005
    return floats


@triton.jit
def add_step(
    sums,
    packed,
    floats,
    inverse,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """`sums`, a tensor `[BN, BW / 4]` for each row, plus the products of a step."""
    added = ()
    for m in tl.static_range(BM):
        q = words_of_codes(quantize_codes(floats[m], inverse), BW, PLANES)
        acc = 0
        for p in tl.static_range(PLANES):
            acc = dot_bytes(plane_of_words(packed, p, BITS), q[p][None, :], acc)
        added = added + (sums[m] + tl.sum(tl.reshape(acc, (BN, BW // 4, 4)), 2),)  # noqa: RUF005
    return added


@triton.jit(do_not_specialize=["rows"])
def decode_linear(
    x,
    weight,
    weight_scale,
    input_scale,
    output_scale,
    bias,
    y,
    rows,
    out_features,
    in_features,
    row_words,
    ahead,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SHIFT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """`x` `[M, K]` floats to `y` `[M, N]`, M <= BM; a program takes BN channels and all rows, BW words at a time.

    The arguments are `fused_linear`'s (triton_linear.py), for 2, 4 and 8 bits and one scale per channel. `weight` is
    aligned to 16 bytes and so is each of its rows, of `row_words` 4-byte words, STEPS times BW or less. Everything a
    program reads at first is asked for before anything is computed, and each step's loads before the last one's sums.

    A layer's parameters are nobody's output, so what a program needs of them at first is on its way into registers
    before it waits for the kernel before; only `x` is read after that.
    """
    channels = tl.program_id(0) * BN + tl.arange(0, BN)
    last = out_features - 1
    in_channels = channels < out_features
    # Rows past N repeat the last one: their results are not stored.
    at = weight.to(tl.pointer_type(tl.int32)) + tl.minimum(channels, last)[:, None].to(tl.int64) * row_words
    packed = load_words(at, 0, row_words, BW)
    if PREFETCH and STEPS > 1:
        prefetch_rows(weight + tl.minimum(channels, last).to(tl.int64) * (row_words * 4), ahead, PIECES)
    s_in = tl.load(input_scale)
    s_out = load_output_scale(output_scale, channels, in_channels, OUTPUTS)
    scale, late = load_channels(weight_scale, bias, channels, in_channels, BIAS, False)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    floats = load_rows(x, 0, rows, in_features, BM, BW, PLANES)
    inverse = tl.math.div_rn(1.0, s_in)
    sums = ()
    for _ in tl.static_range(BM):
        sums = sums + (tl.zeros((BN, BW // 4), tl.int32),)  # noqa: RUF005  (Triton has no starred tuples)
    for step in range(1, STEPS):
        next_packed = load_words(at, step * BW, row_words, BW)
        next_floats = load_rows(x, step * BW, rows, in_features, BM, BW, PLANES)
        sums = add_step(sums, packed, floats, inverse, BM, BN, BW, BITS, PLANES)
        packed, floats = next_packed, next_floats
    sums = add_step(sums, packed, floats, inverse, BM, BN, BW, BITS, PLANES)
    ratio, early, late = channel_terms(scale, late, s_in, s_out, OUTPUTS, BIAS, False)
    for m in tl.static_range(BM):
        total = ((tl.sum(sums[m], 1) >> SHIFT) + early).to(tl.float32) * ratio
        total = finish(total, s_out, late, OUTPUTS, BIAS and OUTPUTS == 0)
        value = rounded_to(total, y.dtype.element_ty)
        end = tl.where(m < rows, out_features, 0)
        tl.store(y + m * out_features + channels, value, mask=channels < end)
