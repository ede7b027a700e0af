"""Integer linear layers on NVIDIA GPUs, in portable Triton: one launch for few rows, two for many.

    q[m,k] = clamp(rne(f32(x[m,k]) * f32(1 / s_in)), -128, 127)
    acc[n,m] = sum_k w[n,k] * q[m,k]                                    int8 tensor cores, exact int32
    y[m,n] = requantized acc, as `numerics.requantize` says

`fused_linear` (few rows; the weight's bytes are the limit) does all three in one launch: a program owns BN output
channels and all rows, walks K once, and quantizes the activations it meets. `codes_linear` (many rows; the tensor cores
are the limit) takes activations that `quantize_planes` has written as codes, each row's planes one after another:

    x, N = 4      k = 0  1  2  3  4  5 ...
    codes         [ 0 2 4 ... | 1 3 5 ... ]      P planes of `blocks` codes, zero past K

so that plane p of a tile of weight bytes meets one contiguous tile of codes (triton_codes.py says why that is enough).
Zeros past K make whatever the weight's last byte holds there count for nothing.

The weight is the left operand: its codes are unpacked in registers on their way to the tensor core and never written
anywhere. Row offsets are 64-bit; a row itself is far shorter than 2^31 bytes.

Group scales: a tile is a group or a part of one, `acc` starts again at each, and the products with the scales are added
in ascending order, starting from -0 so that the first addition changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bytelane.kernels.triton_codes import (
    channel_terms,
    finish,
    group_ratio,
    load_bytes,
    load_channels,
    load_floats,
    load_output_scale,
    load_plane,
    prefetch_rows,
    quantize_codes,
    rounded_to,
    split_planes,
)


@triton.jit(do_not_specialize=["rows"])
def fused_linear(
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
    row_bytes,
    groups,
    group_blocks,
    ahead,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SHIFT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One launch: `x` `[M, K]` floats to `y` `[M, N]`, M <= BM.

    Args:
        x: `[M, K]`, contiguous.
        weight: canonical rows `[N, row_bytes]`.
        weight_scale: `[N, groups]`.
        input_scale: one.
        output_scale: one, `[N]`, or anything.
        bias: `[N]` or anything.
        y: `[M, N]`.
        rows: M.
        out_features: N.
        in_features: K.
        row_bytes: bytes in a row of the weight.
        groups: scales in a channel.
        group_blocks: blocks of codes in a group, all of a row's without groups.
        ahead: bytes of a piece.
        BITS: N-bit weights.
        PLANES: codes in a block.
        SHIFT: of the accumulator.
        OUTPUTS: 0 no output scale, 1 one, 2 one for each channel.
        BIAS: whether there is a bias.
        GROUPED: whether there are several scales in a channel.
        EVEN: every tile lies inside rows and groups, so that nothing is masked.
        BN: output channels of a program.
        BM: rows of activations, a power of two.
        BB: blocks of a tile.
        SPLIT: parts of a tile that different warps multiply.
        PDL: launched while the kernel before it may still run (programmatic dependent launch, sm_90).
        PREFETCH: whether to ask for pieces of the weight's rows before waiting for that kernel.
        PIECES: pieces of each row to ask for, one by each thread.
    """
    channels = tl.program_id(0) * BN + tl.arange(0, BN)
    in_channels = channels < out_features
    m = tl.arange(0, BM)
    in_m = m < rows
    if PDL:
        # The kernel before may still be at work on what this one reads, or on what it overwrites. The weights are
        # nobody's: they start on their way to the second-level cache before the wait.
        if PREFETCH:
            rows_at = weight + tl.minimum(channels, out_features - 1).to(tl.int64) * row_bytes
            prefetch_rows(rows_at, ahead, PIECES)
        gdc_wait()
        gdc_launch_dependents()
    s_in = tl.load(input_scale)
    inverse = tl.math.div_rn(1.0, s_in)
    column = channels[:, None]
    in_column = in_channels[:, None]
    s_out = load_output_scale(output_scale, column, in_column, OUTPUTS)
    scale, late = load_channels(weight_scale, bias, column, in_column, BIAS, GROUPED)
    ratio, early, late = channel_terms(scale, late, s_in, s_out, OUTPUTS, BIAS, GROUPED)
    total = tl.full((BN, BM), -0.0, tl.float32)
    acc = tl.zeros((BN, BM), tl.int32)
    parts = tl.zeros((SPLIT, BN, BM), tl.int32)
    row_blocks = group_blocks * groups
    x_rows = x + m[:, None] * in_features
    for g in range(0, groups):
        end = (g + 1) * group_blocks
        for first in range(g * group_blocks, end, BB):
            floats = load_floats(x_rows, in_m[:, None], first, end, in_features, BB, PLANES)
            q = split_planes(quantize_codes(floats, inverse), BM, BB, PLANES)
            if SPLIT == 1:
                at = weight + column.to(tl.int64) * row_bytes
                blocks = (first + tl.arange(0, BB))[None, :]
                inside = in_column
            else:
                at = weight + channels[None, :, None].to(tl.int64) * row_bytes
                part = tl.arange(0, SPLIT)[:, None, None] * (BB // SPLIT)
                blocks = first + part + tl.arange(0, BB // SPLIT)[None, None, :]
                inside = in_channels[None, :, None]
            packed = load_bytes(at, blocks, inside, row_blocks, BITS, EVEN)
            for p in tl.static_range(PLANES):
                codes = load_plane(packed, at, blocks, inside & (blocks < row_blocks), row_bytes, p, BITS, SHIFT)
                if SPLIT == 1:
                    acc = tl.dot(codes, tl.trans(q[p]), acc, out_dtype=tl.int32)
                else:
                    right = tl.permute(tl.reshape(q[p], (BM, SPLIT, BB // SPLIT)), (1, 2, 0))
                    parts = tl.dot(codes, right, parts, out_dtype=tl.int32)
        if GROUPED:
            if SPLIT > 1:
                acc = tl.sum(parts, 0)
                parts = tl.zeros((SPLIT, BN, BM), tl.int32)
            scale = group_ratio(weight_scale, s_in, s_out, column, in_column, g, groups, OUTPUTS)
            total = total + (acc >> SHIFT).to(tl.float32) * scale
            acc = tl.zeros((BN, BM), tl.int32)
    if not GROUPED:
        if SPLIT > 1:
            acc = tl.sum(parts, 0)
        total = ((acc >> SHIFT) + early).to(tl.float32) * ratio
    total = finish(total, s_out, late, OUTPUTS, BIAS and (GROUPED or OUTPUTS == 0))
    to = y + m[None, :].to(tl.int64) * out_features + column
    tl.store(to, rounded_to(total, y.dtype.element_ty), mask=in_column & in_m[None, :])


@triton.jit(do_not_specialize=["rows", "whole"])
def codes_linear(
    q,
    weight,
    weight_scale,
    input_scale,
    output_scale,
    bias,
    y,
    parts,
    arrived,
    rows,
    out_features,
    row_bytes,
    plane_stride,
    split_blocks,
    whole,
    groups,
    group_blocks,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SHIFT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
    BAND: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Codes `q` `[M, PLANES, plane_stride]` to `y` `[M, N]`, or to accumulators `[M, N, groups]` (ACCUMULATE).

    The arguments are `fused_linear`'s; BAND is how many tiles of channels take turns before the next tile of rows, so
    that programs which run together share tiles in the second-level cache. EVEN also says that every channel is there.

    With SPLITS over 1 (one group only), the first `whole` tiles have a program each, and so many programs share each of
    the others: every one walks `split_blocks` blocks of K and leaves its int32 sums in `parts` `[shared tiles, SPLITS,
    BN, BM]`; the one that arrives last, by the tile's count in `arrived` (zero before), adds them all up and finishes.
    Sums of int32 have no order, so the bits are the same. Sharing only what a device's last wave of programs would have
    to do fills that wave and leaves few sums to write.
    """
    program = tl.program_id(0)
    split = 0
    shared = 0
    if SPLITS > 1:
        beyond = tl.maximum(program - whole, 0)
        split = beyond % SPLITS
        shared = beyond // SPLITS
        program = tl.minimum(program, whole) + shared
    tiles_n = tl.cdiv(out_features, BN)
    tiles_m = tl.cdiv(rows, BM)
    band = program // (BAND * tiles_m)
    width = tl.minimum(tiles_n - band * BAND, BAND)
    within = program % (BAND * tiles_m)
    channels = (band * BAND + within % width) * BN + tl.arange(0, BN)
    m = (within // width) * BM + tl.arange(0, BM)
    in_channels = channels < out_features
    in_m = m < rows
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    s_in = tl.load(input_scale)
    column = channels[:, None]
    in_column = in_channels[:, None]
    s_out = load_output_scale(output_scale, column, in_column, OUTPUTS)
    scale, late = load_channels(weight_scale, bias, column, in_column, BIAS, GROUPED)
    ratio, early, late = channel_terms(scale, late, s_in, s_out, OUTPUTS, BIAS, GROUPED)
    total = tl.full((BN, BM), -0.0, tl.float32)
    acc = tl.zeros((BN, BM), tl.int32)
    row_blocks = group_blocks * groups
    # Rows past M repeat the last one: their results are not stored, and nothing is masked.
    codes_at = q + tl.minimum(m, rows - 1)[None, :].to(tl.int64) * (plane_stride * PLANES)
    weight_at = weight + tl.minimum(channels, out_features - 1)[:, None].to(tl.int64) * row_bytes
    to = m[None, :].to(tl.int64) * out_features + column
    inside = in_column & in_m[None, :]
    for g in range(0, groups):
        start = g * group_blocks
        end = start + group_blocks
        if SPLITS > 1:
            start = tl.where(program < whole, start, split * split_blocks)
            end = tl.where(program < whole, end, tl.minimum(start + split_blocks, group_blocks))
        for first in range(start, end, BB):
            offsets = first + tl.arange(0, BB)
            blocks = offsets[None, :]
            packed = load_bytes(weight_at, blocks, in_column, row_blocks, BITS, EVEN)
            for p in tl.static_range(PLANES):
                codes = load_plane(packed, weight_at, blocks, blocks < row_blocks, row_bytes, p, BITS, SHIFT)
                if EVEN or not GROUPED:
                    right = tl.load(codes_at + (p * plane_stride + offsets)[:, None])
                else:
                    in_group = (offsets < (g + 1) * group_blocks)[:, None]
                    right = tl.load(codes_at + (p * plane_stride + offsets)[:, None], mask=in_group, other=0)
                acc = tl.dot(codes, right, acc, out_dtype=tl.int32)
        if ACCUMULATE and SPLITS == 1:
            tl.store(y + to * groups + g, acc >> SHIFT, mask=inside)
            acc = tl.zeros((BN, BM), tl.int32)
        elif GROUPED:
            scale = group_ratio(weight_scale, s_in, s_out, column, in_column, g, groups, OUTPUTS)
            total = total + (acc >> SHIFT).to(tl.float32) * scale
            acc = tl.zeros((BN, BM), tl.int32)
    if SPLITS > 1:
        slot = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tile = parts + shared.to(tl.int64) * (SPLITS * BN * BM)
        others = 0
        if program >= whole:
            tl.store(tile + split * (BN * BM) + slot, acc)
            tl.debug_barrier()  # every thread's part is written before the count says so
            others = SPLITS - 1 - tl.atomic_add(arrived + shared, 1, sem="acq_rel")
        if others > 0:
            return
        if program >= whole:
            acc = tl.zeros((BN, BM), tl.int32)
            for other in range(SPLITS):
                acc += tl.load(tile + other * (BN * BM) + slot, cache_modifier=".cg")
        if ACCUMULATE:
            tl.store(y + to, acc >> SHIFT, mask=inside)
    if not ACCUMULATE:
        if not GROUPED:
            total = ((acc >> SHIFT) + early).to(tl.float32) * ratio
        total = finish(total, s_out, late, OUTPUTS, BIAS and (GROUPED or OUTPUTS == 0))
        tl.store(y + to, rounded_to(total, y.dtype.element_ty), mask=inside)


@triton.jit
def quantize_planes(
    x,
    scale,
    q,
    arrived,
    tiles,
    in_features,
    plane_stride,
    PLANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    CODES: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Floats `[M, K]` to codes `[M, PLANES, plane_stride]`: code k at `[k % PLANES, k // PLANES]`, zero past K.

    With one plane and a stride of K this is plain quantization; with CODES, `x` is codes already and only put in
    planes. A program writes BLOCKS codes of each plane of a row; the first also sets the counts of `tiles` tiles, for
    the launch that follows, to zero. EARLY lets that launch begin, up to where it waits, before this one has `x`.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCKS
    if EARLY:
        gdc_launch_dependents()
    if PDL:
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    k = first * PLANES + tl.arange(0, BLOCKS * PLANES)
    values = tl.load(x + row * in_features + k, mask=k < in_features, other=0)
    if not CODES:
        values = quantize_codes(values, tl.math.div_rn(1.0, tl.load(scale)))
    if tl.program_id(0) + tl.program_id(1) == 0:
        for tile in range(0, tiles, 128):
            counts = tile + tl.arange(0, 128)
            tl.store(arrived + counts, tl.zeros((128,), tl.int32), mask=counts < tiles)
    codes = split_planes(values[None, :], 1, BLOCKS, PLANES)
    blocks = first + tl.arange(0, BLOCKS)[None, :]
    for p in tl.static_range(PLANES):
        tl.store(q + (row * PLANES + p) * plane_stride + blocks, codes[p], mask=blocks < plane_stride)
