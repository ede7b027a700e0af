"""The kernels behind `bytelane.tune.triton_fake`, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from bytelane.kernels.triton_codes import ROUND, rounded_to


@triton.jit
def _round(scaled, low, high):
    """Codes and the residual of `bytelane.tune.fake.round_scaled`; low and high within int8."""
    # one step beyond the range is enough to know that a value is clipped, and small enough to round by adding
    nearest = (tl.maximum(tl.minimum(scaled, high + 1.0), low - 1.0) + ROUND) - ROUND
    codes = tl.maximum(tl.minimum(nearest, high), low)
    return codes, tl.where(nearest == codes, codes - scaled, codes)


@triton.jit
def _is_inside(residual):
    return tl.abs(residual) <= 0.5


@triton.jit
def code_elements(x, reciprocal, y, count, low, high, BLOCK: tl.constexpr):
    """Codes of activations, of any shape."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    scaled = tl.load(x + at, mask=inside, other=0).to(tl.float32) * tl.load(reciprocal)
    codes, _ = _round(scaled, low, high)
    tl.store(y + at, codes.to(y.dtype.element_ty), mask=inside)


@triton.jit
def requantize_tiles(
    acc, ratio, bias, scale, y, residual, rows, columns, low, high, BIAS: tl.constexpr, TILE: tl.constexpr
):
    """Sums `[rows, columns]` to outputs and residuals; a program takes a square of TILE."""
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None].to(tl.int64)
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    total = tl.load(acc + at, mask=inside, other=0)
    if BIAS:
        total = total + tl.load(bias + column, mask=column < columns, other=0)
    codes, left = _round(total * tl.load(ratio + column, mask=column < columns, other=0), low, high)
    tl.store(y + at, rounded_to(codes * tl.load(scale), y.dtype.element_ty), mask=inside)
    tl.store(residual + at, rounded_to(left, residual.dtype.element_ty), mask=inside)


@triton.jit
def through_output_elements(gradient, residual, out, sums, count, BLOCK: tl.constexpr):
    """A gradient before the output's rounding, and a program's part of the scale's."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
    left = tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, rounded_to(tl.where(_is_inside(left), g, 0.0), out.dtype.element_ty), mask=inside)
    tl.store(sums + program, tl.sum(g * left, 0))


@triton.jit
def through_input_elements(gradient, x, reciprocal, out, sums, count, low, high, BLOCK: tl.constexpr):
    """A gradient before the input's rounding, and a program's part of the scale's."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
    _, left = _round(tl.load(x + at, mask=inside, other=0).to(tl.float32) * tl.load(reciprocal), low, high)
    tl.store(out + at, rounded_to(tl.where(_is_inside(left), g, 0.0), out.dtype.element_ty), mask=inside)
    tl.store(sums + program, tl.sum(g * left, 0))


@triton.jit
def weight_rows(weight, reciprocal, scale, out, columns, low, high, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Weight codes, or the values they stand for; a program takes a row."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(reciprocal + row)
    factor = tl.load(scale + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        at = row * columns + column
        codes, _ = _round(tl.load(weight + at, mask=inside, other=0) * inverse, low, high)
        if SCALED:
            codes = codes * factor
        tl.store(out + at, rounded_to(codes, out.dtype.element_ty), mask=inside)


@triton.jit
def through_weight_rows(gradient, weight, reciprocal, factor, out, sums, columns, low, high, BLOCK: tl.constexpr):
    """A gradient before the weight's rounding, and a row's by its scale."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(reciprocal + row)
    times = tl.load(factor)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        at = row * columns + column
        g = tl.load(gradient + at, mask=inside, other=0) * times
        _, left = _round(tl.load(weight + at, mask=inside, other=0) * inverse, low, high)
        tl.store(out + at, tl.where(_is_inside(left), g, 0.0), mask=inside)
        total += g * left
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def loss_rows(
    student,
    teacher,
    labels,
    losses,
    out,
    vocabulary,
    kl_weight,
    text_weight,
    share,
    TEACHER: tl.constexpr,
    TEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. With p and q of logits t and s: `KL(p || q) = sum p (t - s) - log sum e^t + log sum e^s`."""
    row = tl.program_id(0).to(tl.int64)
    s_row = student + row * vocabulary
    t_row = teacher + row * vocabulary
    nothing = tl.zeros((), tl.float32)
    s_top, s_sum = nothing - float("inf"), nothing
    t_top, t_sum, apart = nothing - float("inf"), nothing, nothing
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        s = tl.load(s_row + column, mask=inside, other=-float("inf")).to(tl.float32)
        top = tl.maximum(s_top, tl.max(s, 0))
        s_sum = s_sum * tl.exp(s_top - top) + tl.sum(tl.exp(s - top), 0)
        s_top = top
        if TEACHER:
            t = tl.load(t_row + column, mask=inside, other=-float("inf")).to(tl.float32)
            top = tl.maximum(t_top, tl.max(t, 0))
            before = tl.exp(t_top - top)
            e = tl.exp(t - top)
            t_sum = t_sum * before + tl.sum(e, 0)
            apart = apart * before + tl.sum(tl.where(inside, e * (t - s), 0.0), 0)
            t_top = top
    s_log = s_top + tl.log(s_sum)
    t_log = t_top + tl.log(t_sum)
    loss = nothing
    by_text = nothing
    if TEACHER:
        loss += kl_weight * (apart / t_sum - t_log + s_log)
    if TEXT:
        label = tl.load(labels + row)
        by_text = tl.where(label >= 0, text_weight, 0.0)
        loss += by_text * (s_log - tl.load(s_row + tl.maximum(label, 0)).to(tl.float32))
    tl.store(losses + row, loss)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        s = tl.load(s_row + column, mask=inside, other=-float("inf")).to(tl.float32)
        g = tl.exp(s - s_log) * (kl_weight + by_text)
        if TEACHER:
            t = tl.load(t_row + column, mask=inside, other=-float("inf")).to(tl.float32)
            g -= kl_weight * tl.exp(t - t_log)
        if TEXT:
            g -= tl.where(column == label, by_text, 0.0)
        tl.store(out + row * vocabulary + column, rounded_to(g * share, out.dtype.element_ty), mask=inside)
