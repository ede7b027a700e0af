"""What a quantized layer does in training beside its matmuls, in Triton: one pass over memory each.

The functions take and return what those of `bytelane.tune.fake` with the same names do, forward to the bit: fusion of
products and sums is off, roundings are half to even, and nothing divides. A sum over a whole tensor is taken tile by
tile and the tiles' sums are added by torch, in a fixed order, so the same inputs give the same gradients.

The loss over a vocabulary is here too: `row_losses` reads the two rows of logits twice, the second time from the cache,
and writes the gradient, where torch's operations pass over a dozen float32 copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytelane.kernels.triton_codes import ROUND, rounded_to

_BLOCK = 4096
"""Elements of a program of the kernels that see no rows."""
_TILE = 64
"""Rows and columns of a program of `requantize`."""
_COLUMNS = 1024
"""Columns of a weight's row at a time."""
_VOCABULARY = 4096
"""Logits of a row at a time."""


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
def _codes_kernel(x, reciprocal, y, count, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    scaled = tl.load(x + at, mask=inside, other=0).to(tl.float32) * tl.load(reciprocal)
    codes, _ = _round(scaled, low, high)
    tl.store(y + at, codes.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _requantize_kernel(
    acc, ratio, bias, scale, y, residual, rows, columns, low, high, BIAS: tl.constexpr, TILE: tl.constexpr
):
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
def _through_output_kernel(gradient, residual, out, sums, count, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
    left = tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, rounded_to(tl.where(_is_inside(left), g, 0.0), out.dtype.element_ty), mask=inside)
    tl.store(sums + program, tl.sum(g * left, 0))


@triton.jit
def _through_input_kernel(gradient, x, reciprocal, out, sums, count, low, high, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
    _, left = _round(tl.load(x + at, mask=inside, other=0).to(tl.float32) * tl.load(reciprocal), low, high)
    tl.store(out + at, rounded_to(tl.where(_is_inside(left), g, 0.0), out.dtype.element_ty), mask=inside)
    tl.store(sums + program, tl.sum(g * left, 0))


@triton.jit
def _weight_kernel(weight, reciprocal, scale, out, columns, low, high, SCALED: tl.constexpr, BLOCK: tl.constexpr):
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
def _through_weight_kernel(gradient, weight, reciprocal, factor, out, sums, columns, low, high, BLOCK: tl.constexpr):
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
def _row_losses_kernel(
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


def input_codes(x: Tensor, reciprocal: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """See `bytelane.tune.fake.input_codes`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _flat(_codes_kernel, y.numel(), x, reciprocal, y, y.numel(), float(low), float(high))
    return y


def requantize(
    acc: Tensor, ratio: Tensor, bias: Tensor | None, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `bytelane.tune.fake.requantize`."""
    rows, columns = acc.shape
    y = torch.empty(acc.shape, dtype=dtype, device=acc.device)
    residual = torch.empty(acc.shape, dtype=torch.bfloat16, device=acc.device)
    if acc.numel():
        _requantize_kernel[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
            acc,
            ratio,
            acc if bias is None else bias,
            scale,
            y,
            residual,
            rows,
            columns,
            float(low),
            float(high),
            BIAS=bias is not None,
            TILE=_TILE,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return y, residual


def through_output(gradient: Tensor, residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `bytelane.tune.fake.through_output`."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    sums = _sums(gradient)
    _flat(_through_output_kernel, out.numel(), gradient, residual, out, sums, out.numel())
    return out, sums.sum()


def through_input(gradient: Tensor, x: Tensor, reciprocal: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """See `bytelane.tune.fake.through_input`."""
    out, sums = torch.empty_like(x), _sums(x)
    _flat(_through_input_kernel, x.numel(), gradient, x, reciprocal, out, sums, x.numel(), float(low), float(high))
    return out, sums.sum()


def weight_operand(weight: Tensor, scale: Tensor, low: int, high: int, *, scaled: bool, dtype: torch.dtype) -> Tensor:
    """See `bytelane.tune.fake.weight_operand`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _weight_kernel[(weight.shape[0],)](
        weight,
        torch.reciprocal(scale),
        scale,
        out,
        weight.shape[1],
        float(low),
        float(high),
        SCALED=scaled,
        BLOCK=_COLUMNS,
        enable_fp_fusion=False,
    )
    return out


def through_weight(
    gradient: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """See `bytelane.tune.fake.through_weight`."""
    out, sums = torch.empty_like(weight), torch.empty_like(scale)
    _through_weight_kernel[(weight.shape[0],)](
        gradient,
        weight,
        torch.reciprocal(scale),
        factor,
        out,
        sums,
        weight.shape[1],
        float(low),
        float(high),
        BLOCK=_COLUMNS,
        enable_fp_fusion=False,
    )
    return out, sums


def row_losses(
    student: Tensor, teacher: Tensor | None, labels: Tensor, kl_weight: float, text_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss of every position and the gradient of their mean; see `bytelane.tune.loss`.

    Args:
        student: logits `[n, vocabulary]`, contiguous.
        teacher: likewise, or None.
        labels: int64 `[n]`; a negative one has no text term.
        kl_weight: a.
        text_weight: b.

    Returns:
        float32 `[n]`, and the gradient in the shape and dtype of the student's logits.
    """
    count, vocabulary = student.shape
    losses = torch.empty(count, dtype=torch.float32, device=student.device)
    gradient = torch.empty_like(student)
    _row_losses_kernel[(count,)](
        student,
        student if teacher is None else teacher,
        labels,
        losses,
        gradient,
        vocabulary,
        float(kl_weight),
        float(text_weight),
        1.0 / count,
        TEACHER=teacher is not None,
        TEXT=text_weight != 0,
        BLOCK=_VOCABULARY,
        num_warps=8,
    )
    return losses, gradient


def _sums(like: Tensor) -> Tensor:
    return torch.empty(triton.cdiv(like.numel(), _BLOCK), dtype=torch.float32, device=like.device)


def _flat(kernel: triton.JITFunction, count: int, *arguments: object) -> None:
    if count:
        kernel[(triton.cdiv(count, _BLOCK),)](*arguments, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False)
