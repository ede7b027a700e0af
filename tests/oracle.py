"""A second, independent statement of the `integer` numerics: NumPy, int64 accumulators, nothing from the package.

    q[m,k]   = clamp(rne(x[m,k] * f32(1 / s_in)), -128, 127)           NaN and +inf give 127, -inf gives -128
    acc[m,n,g] = sum over k in group g of q[m,k] * w[n,k]              exact
    t[m,n]   = f32(acc[m,n,0]) * r[n,0] + f32(acc[m,n,1]) * r[n,1] + ...   in ascending g, one rounding per operation
    o[m,n]   = clamp(rne(t[m,n]), -128, 127)                            r = f32(f32(s_in * s_w) / s_out)
    y[m,n]   = f32(o[m,n]) * s_out

Without an output scale r is f32(s_in * s_w), y is t, and the float bias is added last. With an output scale the bias
is rounded to an int32 in units of f32(s_in * s_w) and joins acc, wrapping at 32 bits (one group), or joins t last as
f32(bias / s_out) (several groups).

Every function takes and returns float32 arrays; NumPy's float32 operations round once each and never fuse. A test that
agrees with this file says that two programs written from the same formulas agree, bit for bit. Packing is done here
through strings of single bits, which shares no shift or mask with the package.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32


def _f32(value) -> np.ndarray:
    return np.asarray(value).astype(F32, casting="same_kind")


def _scalar(value) -> np.float32:
    """A one-element scale of shape `[]` or `[1]` as a float32 scalar."""
    return _f32(value).reshape(-1)[0]


def _round_to_int8(t: np.ndarray) -> np.ndarray:
    # NaN is replaced first: its cast to an integer is undefined. np.rint rounds half to even.
    rounded = np.rint(np.where(np.isnan(t), F32(127), t))
    return np.minimum(np.maximum(rounded, F32(-128)), F32(127)).astype(np.int8)


def quantize(x, s_in) -> np.ndarray:
    """float32 activations of any shape to int8 codes."""
    # Products beyond the range of float32 become infinities, which saturate: defined here, so not worth a warning.
    with np.errstate(over="ignore", invalid="ignore"):
        inverse = F32(1) / _scalar(s_in)
        return _round_to_int8(_f32(x) * inverse)


def accumulate(q, w, group_size: int = 0) -> np.ndarray:
    """int8 `[M, K]` and `[N, K]` to the exact dot product of every group, int64 `[M, N, G]`."""
    q, w = np.asarray(q).astype(np.int64), np.asarray(w).astype(np.int64)
    k = q.shape[1]
    step = group_size or max(k, 1)
    starts = range(0, k, step) if k else [0]
    return np.stack([q[:, s : s + step] @ w[:, s : s + step].T for s in starts], axis=2)


def bias_codes(bias, weight_scale, input_scale) -> np.ndarray:
    """The float bias of a layer with one scale per channel in units of its accumulator, int64 `[N]`."""
    unit = _scalar(input_scale) * _f32(weight_scale)[:, 0]
    return np.rint(_f32(bias) / unit).astype(np.int64)


def _scaled_sum(acc, weight_scale, input_scale, output_scale, bias) -> np.ndarray:
    """`t` of the module docstring: float32 `[M, N]`, before the rounding to a code."""
    acc = np.asarray(acc)
    ratio = _scalar(input_scale) * _f32(weight_scale)
    if output_scale is not None:
        ratio = ratio / _scalar(output_scale)
    one_group = acc.shape[2] == 1
    if bias is not None and output_scale is not None and one_group:
        acc = acc + bias_codes(bias, weight_scale, input_scale)[None, :, None]
    # The vendor's sum is an int32 register that wraps; NumPy's cast wraps likewise. One rounding follows, to float32.
    terms = acc.astype(np.int32).astype(F32) * ratio[None]
    total = terms[:, :, 0]
    for g in range(1, acc.shape[2]):
        total = total + terms[:, :, g]
    if bias is None or (output_scale is not None and one_group):
        return total
    return total + (_f32(bias) if output_scale is None else _f32(bias) / _scalar(output_scale))


def requantize_codes(acc, weight_scale, input_scale, output_scale, bias=None) -> np.ndarray:
    """Accumulators `[M, N, G]` to int8 output codes `[M, N]`; an int32 bias is added to `acc` by the caller."""
    return _round_to_int8(_scaled_sum(acc, weight_scale, input_scale, output_scale, bias))


def requantize(acc, weight_scale, input_scale, output_scale, bias) -> np.ndarray:
    """Accumulators `[M, N, G]` to float32 outputs `[M, N]`; `output_scale` and `bias` may be None."""
    if output_scale is None:
        return _scaled_sum(acc, weight_scale, input_scale, None, bias)
    codes = requantize_codes(acc, weight_scale, input_scale, output_scale, bias)
    return codes.astype(F32) * _scalar(output_scale)


def linear(x, codes, weight_scale, input_scale, output_scale=None, bias=None, group_size: int = 0) -> np.ndarray:
    """The whole `integer` layer: float32 `[..., K]` to float32 `[..., N]`."""
    x = _f32(x)
    acc = accumulate(quantize(x.reshape(-1, x.shape[-1]), input_scale), codes, group_size)
    y = requantize(acc, weight_scale, input_scale, output_scale, bias)
    return y.reshape(*x.shape[:-1], np.asarray(codes).shape[0])


def to_bfloat16(x) -> np.ndarray:
    """float32 values rounded to bfloat16, half to even, and returned as float32; NaN stays NaN."""
    x = np.ascontiguousarray(_f32(x))
    bits = x.view(np.uint32).astype(np.uint64)
    # Adding just under half of the dropped part, plus the kept part's lowest bit, carries exactly when rounding half
    # to even goes up.
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), F32(np.nan), kept.astype(np.uint32).view(F32))


def to_float16(x) -> np.ndarray:
    """float32 values rounded to float16, half to even, and returned as float32."""
    with np.errstate(over="ignore"):
        return _f32(x).astype(np.float16).astype(F32)


def pack_bits(codes, bits: int) -> np.ndarray:
    """Signed codes `[R, K]` to uint8 rows `[R, ceil(K * bits / 8)]`: offset 2^(bits-1), dense, lowest bit first."""
    codes = np.asarray(codes)
    offset = 2 ** (bits - 1)
    rows = []
    for row in codes:
        # format() writes the highest bit first; reversed, the row is one string in storage order.
        text = "".join(format(int(c) + offset, f"0{bits}b")[::-1] for c in row)
        rows.append(np.packbits(np.array(list(text), dtype=np.uint8), bitorder="little"))
    width = -(-codes.shape[1] * bits // 8)
    return np.stack(rows) if rows else np.zeros((0, width), np.uint8)


def unpack_bits(packed, bits: int, in_features: int) -> np.ndarray:
    """The inverse of `pack_bits`: uint8 rows, possibly padded at the end, to int8 `[R, in_features]`."""
    packed = np.asarray(packed)
    stream = np.unpackbits(packed, axis=1, count=in_features * bits, bitorder="little")
    places = 2 ** np.arange(bits)
    return (stream.reshape(packed.shape[0], in_features, bits) @ places - 2 ** (bits - 1)).astype(np.int8)
