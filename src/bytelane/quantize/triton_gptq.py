"""GPTQ's loop over columns in Triton: rows know nothing of each other, so a program takes some through all of a block.

What `bytelane.quantize.gptq.round_columns` does, to the bit: no product is fused with a sum, divisions and roundings
are IEEE's. There every column is a handful of operations of torch, a hundred thousand columns a small model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytelane.kernels.triton_codes import ROUND

_ROWS = 32
"""Rows of a program."""


@triton.jit
def _columns(part, upper, scale, codes, errors, count, rows, low, high, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """`part`, `scale`, `codes` and `errors` are `[count, rows]`, `upper` is `[count, count]`."""
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    held = row < rows
    tile = tl.load(
        part + column[:, None] * rows + row[None, :], mask=(column < count)[:, None] & held[None, :], other=0
    )
    for j in range(count):
        w = tl.sum(tl.where((column == j)[:, None], tile, 0.0), 0)
        s = tl.load(scale + j * rows + row, mask=held, other=1)
        scaled = tl.maximum(tl.minimum(tl.div_rn(w, s), high), low)
        code = (scaled + ROUND) - ROUND
        error = tl.div_rn(w - code * s, tl.load(upper + j * count + j + tl.zeros((ROWS,), tl.int32)))
        tl.store(codes + j * rows + row, code.to(tl.int8), mask=held)
        tl.store(errors + j * rows + row, error, mask=held)
        u = tl.load(upper + j * count + column, mask=(column > j) & (column < count), other=0)
        tile = tl.where((column > j)[:, None], tile - u[:, None] * error[None, :], tile)


def round_columns(part: Tensor, upper: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """See `bytelane.quantize.gptq.round_columns`."""
    count, rows = part.shape
    codes, errors = torch.empty_like(part, dtype=torch.int8), torch.empty_like(part)
    _columns[(triton.cdiv(rows, _ROWS),)](
        part,
        upper.contiguous(),
        scale,
        codes,
        errors,
        count,
        rows,
        float(low),
        float(high),
        COLUMNS=triton.next_power_of_2(count),
        ROWS=_ROWS,
        enable_fp_fusion=False,
    )
    return codes, errors
