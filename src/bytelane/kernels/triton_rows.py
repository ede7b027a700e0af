"""Five to sixteen rows of an integer layer: the weight's bytes straight from memory into the tensor cores' operands.

    chunk     128 bytes of each of 16 rows of the weight: what a warp meets at a time
    thread    bytes 16t .. 16t + 15 and 64 + 16t .. 64 + 16t + 15 of two of the rows, in four loads of 16 bytes
    mma       takes 4 bytes of a thread at a time: of what it has, not of what lies beside its neighbour's

A dot product has no order, so the k-th column of a product may be wherever a thread's bytes lie, as long as the
activations lie alike. So the weight passes through no shared memory: its first chunks are on their way into registers
before the kernel before is waited for, and are unpacked where they arrive. The activations of all of K are quantized
once, into shared memory, before the first product; then K is walked without a barrier.

In Gluon, Triton's language with explicit layouts: plain Triton lays loads and operands out by itself, and moves
between the two through shared memory. Gluon has no interpreter, so only devices with a table of tiles of their own
(triton_configs.py) take this; the others take the kernels of triton_linear.py.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bytelane.kernels.triton_codes import plane_of_bytes, round_codes, rounded_to, rounded_to_int

CHUNK = 128
"""Bytes of a row of the weight that meet the tensor cores at a time."""

BYTES = gl.constexpr(CHUNK)


@gluon.constexpr_function
def _codes_layout(rows):
    """Half a chunk of every row, then the other half: what 8 threads read at once lies in different banks."""
    within = [[0, 1 << i] for i in range(6)]
    return gl.SharedLinearLayout([*within, *[[1 << i, 0] for i in range(rows.bit_length() - 1)], [0, 64]])


@gluon.jit
def _pairs_of(values):
    """Values `[BM, 2 B]` to those at even and at odd places, `[BM, B]` each."""
    return gl.split(gl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))


@gluon.jit
def _floats_of(words):
    """int32 words of two bfloat16 to the first ones and the second ones as float32."""
    return (words << 16).to(gl.float32, bitcast=True), (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _planes_of(values, PLANES: gl.constexpr):
    """Activations, or words of two, to a tuple of planes `[BM, 128]`, without moving one between threads."""
    if values.dtype == gl.int32:
        if PLANES == 1:
            low, high = _floats_of(values)
            return (gl.reshape(gl.join(low, high), (values.shape[0], BYTES)),)
        elif PLANES == 2:
            return _floats_of(values)
        else:
            first, second = _pairs_of(values)
            return _floats_of(first) + _floats_of(second)
    elif PLANES == 1:
        return (values,)
    elif PLANES == 2:
        return _pairs_of(values)
    else:
        even, odd = _pairs_of(values)
        p0, p2 = _pairs_of(even)
        p1, p3 = _pairs_of(odd)
        return (p0, p1, p2, p3)


@gluon.jit
def _quantize(x, inverse):
    """`quantize_codes` of four activations at a time: a conversion to int8 clamps, but would make NaN 0."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 v<4>; .reg .s32 c<4>; .reg .b32 upper;
        min.f32 v0, $1, 0f42FE0000; min.f32 v1, $2, 0f42FE0000; min.f32 v2, $3, 0f42FE0000; min.f32 v3, $4, 0f42FE0000;
        cvt.rni.s32.f32 c0, v0; cvt.rni.s32.f32 c1, v1; cvt.rni.s32.f32 c2, v2; cvt.rni.s32.f32 c3, v3;
        cvt.pack.sat.s8.s32.b32 upper, c3, c2, 0; cvt.pack.sat.s8.s32.b32 $0, c1, c0, upper; }""",
        "=r,r,r,r,r",
        [x.to(gl.float32) * inverse],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _load_columns(rows, columns, first, end, WHOLE: gl.constexpr):
    """Of each row the columns from `first` on, 0 from column `end` on."""
    if WHOLE:
        return gl.load(rows + (columns + first)[None, :])
    else:
        return gl.load(rows + (columns + first)[None, :], mask=(columns + first < end)[None, :], other=0)


@gluon.jit(do_not_specialize=["rows"])
def rows_linear(
    x,
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
    in_features,
    row_bytes,
    plane_stride,
    ahead,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    SHIFT: gl.constexpr,
    OUTPUTS: gl.constexpr,
    BIAS: gl.constexpr,
    WHOLE: gl.constexpr,
    CODES: gl.constexpr,
    STEPS: gl.constexpr,
    SPLITS: gl.constexpr,
    DEPTH: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    PDL: gl.constexpr,
    EARLY: gl.constexpr,
    PIECES: gl.constexpr,
):
    """`x` `[M, K]` floats, or codes `[M, PLANES, plane_stride]` (CODES), to `y` `[M, N]`, M <= BM.

    A program takes BN channels, all rows, and STEPS chunks of K, of which there are SPLITS parts. The arguments are
    `fused_linear`'s and, for `parts` and `arrived`, `codes_linear`'s (triton_linear.py), for 2, 4 and 8 bits and one
    scale per channel. `weight` is aligned to 16 bytes and so is each of its rows. WHOLE says that all chunks lie inside
    the rows, DEPTH how many chunks of the weight are on their way at a time.
    """
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 16)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 16)
    # of activations, the threads along a chunk and what each has of it: at least 16 bytes, at least 4 codes of a plane
    EACH: gl.constexpr = 16 if PLANES == 4 else 8
    ALONG: gl.constexpr = BYTES * PLANES // EACH
    # bfloat16 comes in words of two, which are float32 after a shift or a mask
    PER: gl.constexpr = 2 if x.dtype.element_ty == gl.bfloat16 else 1
    floats_layout: gl.constexpr = gl.BlockedLayout([1, EACH // PER], [32 // ALONG, ALONG], [WARPS, 1], [1, 0])
    codes_layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    if EARLY:
        gdc_launch_dependents()
    tile = gl.program_id(0)
    part = gl.program_id(1)
    begin = part * (STEPS * BYTES)
    last = out_features - 1
    # Rows past N repeat the last one: their results are not stored.
    n = gl.minimum(tile * BN + gl.arange(0, BN, gl.SliceLayout(1, left)), last)
    weight_rows = weight + n[:, None].to(gl.int64) * row_bytes
    columns = begin + gl.arange(0, BYTES, gl.SliceLayout(0, left))
    packed = ()
    for c in gl.static_range(DEPTH):
        packed = packed + (_load_columns(weight_rows, columns, c * BYTES, row_bytes, WHOLE),)  # noqa: RUF005
    if PIECES > 0:
        ask: gl.constexpr = gl.BlockedLayout([1, 1], [32 // PIECES, PIECES], [WARPS, 1], [1, 0])
        asked = gl.minimum(tile * BN + gl.arange(0, BN, gl.SliceLayout(1, ask)), last).to(gl.int64) * row_bytes
        piece = gl.arange(0, PIECES, gl.SliceLayout(0, ask)) * ahead
        at = (weight + asked[:, None] + (begin + DEPTH * BYTES)).to(gl.int64) + piece[None, :]
        gl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, $2;",
            "=r,l,r",
            [at, ahead],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    channels = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, mma))
    in_channels = channels < out_features
    s_in = gl.load(input_scale)
    scale = gl.load(weight_scale + channels, mask=in_channels, other=0.0)
    one = gl.full((BN,), 1.0, gl.float32, gl.SliceLayout(1, mma))
    s_out = one
    if OUTPUTS == 2:
        s_out = gl.load(output_scale + channels, mask=in_channels, other=1.0)
    elif OUTPUTS == 1:
        s_out = one * gl.load(output_scale)
    late = scale
    if BIAS:
        late = gl.load(bias + channels, mask=in_channels, other=0.0)
    if PDL:
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    # An allocation for each plane of a chunk: between accesses of different ones the compiler puts no barrier.
    codes = ()
    for _ in gl.static_range(STEPS * PLANES):
        codes = codes + (gl.allocate_shared_memory(gl.int8, [BM, BYTES], _codes_layout(BM)),)  # noqa: RUF005
    loaded = ()
    # Rows past M repeat the last one: their results are not stored.
    if CODES:
        m = gl.minimum(gl.arange(0, BM, gl.SliceLayout(1, codes_layout)), rows - 1)
        k = begin + gl.arange(0, BYTES, gl.SliceLayout(0, codes_layout))
        codes_at = x + m[:, None] * (PLANES * plane_stride) + k[None, :]
        for i in gl.static_range(STEPS * PLANES):
            loaded = loaded + (gl.load(codes_at + ((i % PLANES) * plane_stride + i // PLANES * BYTES)),)  # noqa: RUF005
        for i in gl.static_range(STEPS * PLANES):
            codes[i].store(loaded[i])
    else:
        # as many loads on their way as 32 registers of bfloat16 hold
        HELD: gl.constexpr = max(BM * BYTES * PLANES // (32 * WARPS), EACH)
        AHEAD: gl.constexpr = min(max(64 // HELD, 2), STEPS)
        inverse = tl.math.div_rn(1.0, s_in)
        m = gl.minimum(gl.arange(0, BM, gl.SliceLayout(1, floats_layout)), rows - 1)
        k = begin * PLANES // PER + gl.arange(0, BYTES * PLANES // PER, gl.SliceLayout(0, floats_layout))
        ends = in_features // PER
        values = x.to(gl.pointer_type(gl.int32)) if PER == 2 else x
        x_rows = values + m[:, None] * ends
        for c in gl.static_range(STEPS + AHEAD):
            if c < STEPS:
                floats = _load_columns(x_rows, k, c * (BYTES * PLANES // PER), ends, WHOLE)
                loaded = loaded + (floats,)  # noqa: RUF005
            if c >= AHEAD:
                floats = _planes_of(loaded[c - AHEAD], PLANES)
                for p in gl.static_range(PLANES):
                    codes[(c - AHEAD) * PLANES + p].store(_quantize(floats[p], inverse))
    # Several sums take turns, so that a product need not wait for the one before.
    SUMS: gl.constexpr = 4 if BM == 8 else 2
    sums = ()
    for _ in gl.static_range(SUMS):
        sums = sums + (gl.zeros((BN, BM), gl.int32, mma),)  # noqa: RUF005
    for c in gl.static_range(STEPS):
        if c + DEPTH < STEPS:
            following = _load_columns(weight_rows, columns, (c + DEPTH) * BYTES, row_bytes, WHOLE)
            packed = packed + (following,)  # noqa: RUF005
        for p in gl.static_range(PLANES):
            plane = plane_of_bytes(packed[c], p, BITS, SHIFT)
            met = codes[c * PLANES + p].permute((1, 0)).load(right)
            sums = sums[1:] + (mma_v2(plane, met, sums[0]),)  # noqa: RUF005
    acc = sums[0]
    for i in gl.static_range(SUMS - 1):
        acc += sums[i + 1]
    m_out = gl.arange(0, BM, gl.SliceLayout(0, mma))
    if SPLITS > 1:
        slot = gl.arange(0, BN, gl.SliceLayout(1, mma))[:, None] * BM + m_out[None, :]
        shared = parts + tile.to(gl.int64) * (SPLITS * BN * BM)
        gl.store(shared + part * (BN * BM) + slot, acc)
        tl.debug_barrier()  # every thread's part is written before the count says so
        if gl.atomic_add(arrived + tile, 1, sem="acq_rel") < SPLITS - 1:
            return
        acc = gl.zeros((BN, BM), gl.int32, mma)
        for other in gl.static_range(SPLITS):
            acc += gl.load(shared + other * (BN * BM) + slot, cache_modifier=".cg")
    unit = s_in * scale
    ratio = unit
    if OUTPUTS > 0:
        ratio = tl.math.div_rn(unit, s_out)
    acc = acc >> SHIFT
    if BIAS and OUTPUTS > 0:
        acc += rounded_to_int(tl.math.div_rn(late, unit))[:, None]
    total = acc.to(gl.float32) * ratio[:, None]
    if BIAS and OUTPUTS == 0:
        total += late[:, None]
    if OUTPUTS > 0:
        total = round_codes(total) * s_out[:, None]
    to = y + m_out[None, :].to(gl.int64) * out_features + channels[:, None]
    gl.store(to, rounded_to(total, y.dtype.element_ty), mask=in_channels[:, None] & (m_out < rows)[None, :])
