"""What every Triton kernel here is made of: quantizing, unpacking, requantizing, each the bits of `numerics`.

Quantize      q = clamp(rne(f32(x) * f32(1 / s_in)), -128, 127)
Requantize    o = clamp(rne(t), -128, 127),  y = f32(o) * s_out

Clamping comes before rounding, which is the same because the bounds are integers, and makes the rounding cheap: for
|v| <= 128 the sum `v + 1.5 * 2^23` is rounded to an integer, half to even, by the addition itself, and its low bits are
the code. `min` before `max` sends NaN to 127, as the numerics want; the difference to 1.5 * 2^23 is never -0.

Unpacking. Code i of a row is bits `i*N .. i*N+N-1` of a little-endian bit stream (FORMAT.md, section 3), so the codes
that lie at one place of each byte (or, for widths that do not divide 8, of each block of bytes) form a *plane*:

    N     planes P   block      plane p holds the codes k with k % P == p
    8        1       1 byte     b ^ 0x80
    4        2       1 byte     p = 0: b << 4,  p = 1: b
    2        4       1 byte     p = 0: b << 6,  1: b << 4,  2: b << 2,  3: b           each & mask ^ 0x80
    3, 5, 7  8       N bytes    two bytes, shifted and masked
    6        4       3 bytes    two bytes, shifted and masked

A dot product is a sum over k in any order, so a plane of the weight meets the same plane of the activations and no code
is ever moved to another place. At 2 and 4 bits a code stays in the high bits of its byte: `b & 0xF0 ^ 0x80`, read as a
signed byte, is the code times 16 with its sign, for one instruction over four codes. The accumulator is then the true
one times `2^(8-N)`, which an arithmetic shift takes away again, exactly. `|acc| * 2^(8-N)` is bounded by the
accumulator of 8-bit weights, so int32 holds it for K < 131072; at K = 131072 the codes are shifted down first.

The launches turn floating-point fusion off (`enable_fp_fusion=False`): a product and a sum are two roundings.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter: no inline assembly, `min` passes NaN on, a cast truncates."""

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds |v| <= 2^22 to an integer, half to even."""

MAX_SCALED_FEATURES = 131071
"""The longest row whose accumulator fits int32 at `2^(8-N)` times its value."""


def planes(num_bits: int) -> int:
    """P: codes from one place of a byte, or block of bytes, to the same place of the next."""
    return 8 // math.gcd(num_bits, 8)


def block_bytes(num_bits: int) -> int:
    """Bytes of a block: P codes."""
    return planes(num_bits) * num_bits // 8


def code_shift(num_bits: int, in_features: int) -> int:
    """The accumulator of the kernels is `2^shift` times the true one."""
    return 8 - num_bits if num_bits in (2, 4) and in_features <= MAX_SCALED_FEATURES else 0


@triton.constexpr_function
def _plane_assembly(bits, plane):
    """PTX for plane `plane` of four bytes at once: shift the code to the top, mask, flip the sign bit."""
    if bits == 8:
        return "xor.b32 $0, $1, 0x80808080;"
    mask = f"0x{(256 - (1 << (8 - bits))) * 0x01010101:08X}"
    left = 8 - bits - bits * plane
    if left == 0:
        return f"lop3.b32 $0, $1, {mask}, 0x80808080, 0x6A;"
    return f"{{ .reg .b32 t; shl.b32 t, $1, {left}; lop3.b32 $0, t, {mask}, 0x80808080, 0x6A; }}"


@triton.jit
def clamp_to_int8(v):
    """`clamp(v, -128, 127)` with NaN to 127, as float32."""
    if INTERPRETED:
        v = tl.where(v == v, v, 127.0)
    return tl.maximum(tl.minimum(v, 127.0), -128.0)


@triton.jit
def rounded_to(v, DTYPE: tl.constexpr):
    """float32 `v` cast to DTYPE, half to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = v.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(v == v, kept.to(tl.uint32).to(tl.float32, bitcast=True), v).to(DTYPE)
    else:
        return v.to(DTYPE)


@triton.jit
def round_codes(v):
    """`clamp(rne(v), -128, 127)` as float32, never -0."""
    return (clamp_to_int8(v) + ROUND) - ROUND


@triton.jit
def quantize_codes(x, inverse):
    """Float activations to int8 codes; `inverse` is `f32(1 / s_in)`."""
    return (clamp_to_int8(x.to(tl.float32) * inverse) + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def plane_of_bytes(packed, P: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Plane P of whole bytes of 2-, 4- or 8-bit codes: uint8 to int8, times `2^SHIFT`."""
    if INTERPRETED:
        LEFT: tl.constexpr = 8 - BITS - BITS * P
        MASK: tl.constexpr = 256 - (1 << (8 - BITS))
        codes = (((packed.to(tl.int32) << LEFT) & MASK) ^ 0x80).to(tl.int8)
    else:
        codes = tl.inline_asm_elementwise(
            _plane_assembly(BITS, P), "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    if SHIFT == 0 and BITS != 8:
        codes = codes >> (8 - BITS)
    return codes


@triton.jit
def plane_of_blocks(rows, blocks, mask, row_bytes, P: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Plane P of blocks of several bytes, for the widths that do not divide 8: codes as int8.

    Args:
        rows: pointers to the first byte of each row, broadcasting against `blocks`.
        blocks: indices of blocks in a row.
        mask: which of them are to be read.
        row_bytes: bytes in a row; a last block may be cut short.
        P: the plane.
        BITS: the width.
        BLOCK: bytes in a block.
    """
    FIRST: tl.constexpr = P * BITS // 8
    RIGHT: tl.constexpr = P * BITS % 8
    at = blocks * BLOCK + FIRST
    bits = tl.load(rows + at, mask=mask & (at < row_bytes), other=0).to(tl.int32)
    if RIGHT + BITS > 8:
        bits |= tl.load(rows + at + 1, mask=mask & (at + 1 < row_bytes), other=0).to(tl.int32) << 8
    return (((bits >> RIGHT) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.int8)


@triton.jit
def prefetch_rows(rows, size, PIECES: tl.constexpr):
    """Start moving the first PIECES times `size` bytes of each row to the second-level cache; sm_90.

    `size` and the rows are multiples of 16. With as many pieces as there are threads for each row, every thread asks
    for one of its own; with fewer, several would ask for the same, and each request takes its time in the cache.
    """
    at = rows.to(tl.int64)[:, None] + (tl.arange(0, PIECES) * size)[None, :]
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, $2;",
        "=r,l,r",
        [at, tl.zeros(at.shape, tl.int32) + size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_floats(x_rows, in_rows, first, end, in_features, BB: tl.constexpr, PLANES: tl.constexpr):
    """Activations that meet BB blocks of codes from block `first` on: `[rows, BB * PLANES]`, 0 from block `end` on.

    Args:
        x_rows: pointers `[rows, 1]` to the first activation of each row.
        in_rows: `[rows, 1]`, which rows there are.
        first: the first block.
        end: the block after the last one that counts.
        in_features: K; a last block may go past it.
        BB: blocks.
        PLANES: codes in a block.
    """
    k = (first * PLANES + tl.arange(0, BB * PLANES))[None, :]
    return tl.load(x_rows + k, mask=in_rows & (k < tl.minimum(end * PLANES, in_features)), other=0.0)


@triton.jit
def load_bytes(rows, blocks, in_rows, row_blocks, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Whole bytes of packed codes; of the other widths nothing, their planes are loaded one by one."""
    if 8 % BITS != 0:
        return 0
    elif EVEN:
        return tl.load(rows + blocks)
    else:
        return tl.load(rows + blocks, mask=in_rows & (blocks < row_blocks), other=0)


@triton.jit
def load_plane(packed, rows, blocks, in_rows, row_bytes, P: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Plane P of a tile of the weight."""
    if 8 % BITS == 0:
        return plane_of_bytes(packed, P, BITS, SHIFT)
    else:
        BLOCK: tl.constexpr = BITS // 2 if BITS == 6 else BITS
        return plane_of_blocks(rows, blocks, in_rows, row_bytes, P, BITS, BLOCK)


@triton.jit
def split_planes(q, BM: tl.constexpr, BLOCKS: tl.constexpr, PLANES: tl.constexpr):
    """Codes `[BM, BLOCKS * PLANES]` to a tuple of planes `[BM, BLOCKS]`, without moving one between threads."""
    if PLANES == 1:
        return (q,)
    elif PLANES == 2:
        return tl.split(tl.reshape(q, (BM, BLOCKS, 2)))
    elif PLANES == 4:
        even, odd = tl.split(tl.reshape(q, (BM, BLOCKS, 2, 2)))
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        return (p0, p1, p2, p3)
    else:
        even, odd = tl.split(tl.reshape(q, (BM, BLOCKS, 2, 2, 2)))
        e0, e1 = tl.split(even)
        o0, o1 = tl.split(odd)
        p0, p4 = tl.split(e0)
        p2, p6 = tl.split(e1)
        p1, p5 = tl.split(o0)
        p3, p7 = tl.split(o1)
        return (p0, p1, p2, p3, p4, p5, p6, p7)


@triton.jit
def rounded_to_int(v):
    """`rne(v)` as int32, for |v| < 2^31: from the integer below, by what is left."""
    below = tl.floor(v)
    rest = v - below
    whole = below.to(tl.int32)
    up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    return whole + up.to(tl.int32)


@triton.jit
def load_output_scale(output_scale, channels, in_channels, OUTPUTS: tl.constexpr):
    """`s_out`: one, or one for each channel; 1 where there is none, which nothing then uses."""
    if OUTPUTS == 2:
        return tl.load(output_scale + channels, mask=in_channels, other=1.0)
    elif OUTPUTS == 1:
        return tl.load(output_scale)
    else:
        return 1.0


@triton.jit
def group_ratio(weight_scale, input_scale, s_out, channels, in_channels, g, groups, OUTPUTS: tl.constexpr):
    """`r[n,g]`: `f32(f32(s_in * s_w) / s_out)`, or `f32(s_in * s_w)` without an output scale."""
    unit = input_scale * tl.load(weight_scale + channels * groups + g, mask=in_channels, other=0.0)
    if OUTPUTS > 0:
        unit = tl.math.div_rn(unit, s_out + tl.zeros_like(unit))
    return unit


@triton.jit
def load_channels(weight_scale, bias, channels, in_channels, BIAS: tl.constexpr, GROUPED: tl.constexpr):
    """What `channel_terms` computes with: `(s_w[n], bias[n])`, 0 for what there is not."""
    scale = tl.zeros_like(channels).to(tl.float32)
    late = tl.zeros_like(channels).to(tl.float32)
    if not GROUPED:
        scale = tl.load(weight_scale + channels, mask=in_channels, other=0.0)
    if BIAS:
        late = tl.load(bias + channels, mask=in_channels, other=0.0)
    return scale, late


@triton.jit
def channel_terms(scale, late, input_scale, s_out, OUTPUTS: tl.constexpr, BIAS: tl.constexpr, GROUPED: tl.constexpr):
    """What an epilogue needs of each channel: `(r[n], int32 bias, float bias)`, 0 for what it has not.

    `scale` and `late` are `load_channels`'s, which kernels call before they walk K, so that the loads are done when the
    sums are.
    """
    ratio = tl.zeros_like(scale)
    early = tl.zeros_like(scale).to(tl.int32)
    if not GROUPED:
        unit = input_scale * scale
        ratio = unit
        if OUTPUTS > 0:
            ratio = tl.math.div_rn(unit, s_out + tl.zeros_like(unit))
    if BIAS and OUTPUTS > 0:
        if GROUPED:
            late = tl.math.div_rn(late, s_out + tl.zeros_like(late))
        else:
            early = rounded_to_int(tl.math.div_rn(late, unit))
    return ratio, early, late


@triton.jit
def finish(total, s_out, late, OUTPUTS: tl.constexpr, LATE_BIAS: tl.constexpr):
    """The last float steps: a bias that joins in float (LATE_BIAS), then codes and back where there is a scale."""
    if LATE_BIAS:
        total = total + late
    if OUTPUTS > 0:
        total = round_codes(total) * s_out
    return total


@triton.jit
def emulated_output(value, output_scale):
    """The output step of `emulated`: `fq(value, s_out)`, every operation rounded to the dtype of `value`."""
    dtype: tl.constexpr = value.dtype
    s_out = rounded_to(tl.load(output_scale), dtype).to(tl.float32)
    floats = value.to(tl.float32)
    steps = rounded_to(tl.math.div_rn(floats, s_out + tl.zeros_like(floats)), dtype).to(tl.float32)
    ALL: tl.constexpr = tl.PropagateNan.ALL  # a NaN stays one in `emulated`
    steps = tl.maximum(tl.minimum(steps, 127.0, propagate_nan=ALL), -128.0, propagate_nan=ALL)
    return rounded_to(((steps + ROUND) - ROUND) * s_out, dtype)
