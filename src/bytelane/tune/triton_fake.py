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
from torch import Tensor

from bytelane.tune import triton_kernels as kernels

_BLOCK = 4096
"""Elements of a program of the kernels that see no rows."""
_TILE = 64
"""Rows and columns of a program of `requantize`."""
_COLUMNS = 1024
"""Columns of a weight's row at a time, where it has more."""
_VOCABULARY = 4096
"""Logits of a row at a time."""


def input_codes(x: Tensor, reciprocal: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """See `bytelane.tune.fake.input_codes`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _flat(kernels.code_elements, y.numel(), x, reciprocal, y, y.numel(), float(low), float(high))
    return y


def requantize(
    acc: Tensor, ratio: Tensor, bias: Tensor | None, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `bytelane.tune.fake.requantize`."""
    rows, columns = acc.shape
    y = torch.empty(acc.shape, dtype=dtype, device=acc.device)
    residual = torch.empty(acc.shape, dtype=torch.bfloat16, device=acc.device)
    if acc.numel():
        kernels.requantize_tiles[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
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
    _flat(kernels.through_output_elements, out.numel(), gradient, residual, out, sums, out.numel())
    return out, sums.sum()


def through_input(gradient: Tensor, x: Tensor, reciprocal: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """See `bytelane.tune.fake.through_input`."""
    out, sums = torch.empty_like(x), _sums(x)
    _flat(
        kernels.through_input_elements,
        x.numel(),
        gradient,
        x,
        reciprocal,
        out,
        sums,
        x.numel(),
        float(low),
        float(high),
    )
    return out, sums.sum()


def weight_operand(weight: Tensor, scale: Tensor, low: int, high: int, *, scaled: bool, dtype: torch.dtype) -> Tensor:
    """See `bytelane.tune.fake.weight_operand`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    kernels.weight_rows[(weight.shape[0],)](
        weight,
        torch.reciprocal(scale),
        scale,
        out,
        weight.shape[1],
        float(low),
        float(high),
        SCALED=scaled,
        **_row_block(weight.shape[1]),
        enable_fp_fusion=False,
    )
    return out


def through_weight(
    gradient: Tensor, weight: Tensor, scale: Tensor, factor: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """See `bytelane.tune.fake.through_weight`."""
    out, sums = torch.empty_like(weight), torch.empty_like(scale)
    kernels.through_weight_rows[(weight.shape[0],)](
        gradient,
        weight,
        torch.reciprocal(scale),
        factor,
        out,
        sums,
        weight.shape[1],
        float(low),
        float(high),
        **_row_block(weight.shape[1]),
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
    kernels.loss_rows[(count,)](
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


def _row_block(columns: int) -> dict[str, int]:
    """How a program of a row is launched: groups of 32 are rows too, and one warp each."""
    block = min(_COLUMNS, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(4, block // 128))}


def _sums(like: Tensor) -> Tensor:
    return torch.empty(triton.cdiv(like.numel(), _BLOCK), dtype=torch.float32, device=like.device)


def _flat(kernel: triton.JITFunction, count: int, *arguments: object) -> None:
    if count:
        kernel[(triton.cdiv(count, _BLOCK),)](*arguments, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False)
