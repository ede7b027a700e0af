r"""GPTQ: round a weight column by column and pass each column's error on to those not rounded yet.

For one output channel `w` and inputs `x` the loss of codes `c` with scale `s` is, summed over tokens,

    sum_t (x_t . (w - s c))^2 = (w - s c) H (w - s c)^T,     H = sum_t x_t^T x_t

and rounding column j with error `e = (w_j - s c_j) / U_jj`, U the upper Cholesky factor of `H^-1`, is best answered by
`w_k -= e U_jk` in the columns k > j (Frantar et al., 2022, https://arxiv.org/abs/2210.17323). Here `x` is what the
integer layer will read: the dequantized int8 input, computed by blocks that are quantized already.

A bias takes what is then left of the mean: the layer should give `z . w` with z the float model's own input. Weights
are not fitted to z before rounding, as GPTAQ does (Li et al., 2025, https://arxiv.org/abs/2504.02692): from a few
thousand tokens that spoiled SmolLM2 at 4 bits (perplexity 1621 with it, 89 without, all sides int8).

Tokens are weighted by what an error costs them. Where the product is added to a residual stream, which is read through
a norm, that is its length over the stream's: a first token whose stream is hundreds of times longer than others' would
otherwise speak for all of them.

Scales come first and stay: for every row or group the one of 45 shrunken ranges with the smallest error weighted by
`diag H`. Columns are taken in the order of falling `H_jj`; the stored codes keep their places, since with a scale for
each channel, or groups fixed beforehand, the order leaves no trace in the file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bytelane.kernels.gpu import TRITON
from bytelane.quantize.rounding import round_to_nearest
from bytelane.scheme import WeightScheme, code_range

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean, so that a channel the text never reached stays where it is."""

_COLUMNS = 128
"""Columns whose errors are passed on one by one before the rest of the matrix hears of them in one product."""

_SHRINK = (*torch.linspace(1.0, 0.36, 33).tolist(), *(0.36 * 0.8**i for i in range(1, 13)))
"""What a scale that clips nothing is multiplied by. The small ones are for rows with a weight that only one token
needs."""


class Hessian:
    """`sum x^T x` over the inputs of one layer, float32 `[in, in]`, however many tokens it saw.

    Attributes:
        sum: that sum.
        mean_sums: `sum x` and `sum z`, z the float model's inputs, float64 `[2, in]`, under the tokens' squared
            weights.
        total: the sum of those.
        tokens: how many.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(in_features, in_features, device=device)
        self.mean_sums = torch.zeros(2, in_features, dtype=torch.float64, device=device)
        self.total = 0.0
        self.tokens = 0

    def add(self, x: Tensor, exact: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Take in inputs.

        Args:
            x: `[..., in]`.
            exact: the float model's for the same tokens, where they are others.
            weights: `[...]`, what each token's row of both is multiplied by.
        """
        rows = x.detach().flatten(0, -2).to(torch.float32)
        wanted = rows if exact is None else exact.detach().flatten(0, -2).to(torch.float32)
        factor = rows.new_ones(rows.shape[0], 1) if weights is None else weights.detach().flatten()[:, None].to(rows)
        squares = factor.square().to(torch.float64)
        self.mean_sums += torch.stack([(part * squares).sum(0) for part in (rows, wanted)])
        self.total += float(squares.sum())
        rows = rows * factor
        self.sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]


def corrected_bias(bias: Tensor, weight: Tensor, rounded: Tensor, hessian: Hessian) -> Tensor:
    """The bias with which the mean product of `rounded` with `x` is that of `weight` with `z`, in its own dtype."""
    x, z = (hessian.mean_sums / hessian.total).to(torch.float32)
    found: Tensor = bias.detach().to(torch.float32) + weight.detach().to(torch.float32) @ z - rounded @ x
    return found.to(bias.dtype)


def search_scales(weight: Tensor, scheme: WeightScheme, importance: Tensor, name: str = "weight") -> Tensor:
    """Weight scales that may clip: the least squared error, each column weighted by its importance.

    Args:
        weight: `[out, in]`.
        scheme: width and groups.
        importance: `[in]`, not negative: `diag H`, or ones.
        name: named in errors.

    Returns:
        float32 `[out, groups]`.
    """
    _, largest = round_to_nearest(weight, scheme, name)
    low, high = code_range(scheme.num_bits)
    grouped = weight.detach().to(torch.float32).reshape(weight.shape[0], largest.shape[1], -1)
    weights = importance.to(torch.float32).reshape(1, largest.shape[1], -1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for factor in _SHRINK:
        scale = (largest * factor).clamp_min(torch.finfo(torch.float32).tiny)
        error = (torch.round(grouped / scale[..., None]).clamp_(low, high) * scale[..., None] - grouped).square_()
        loss = (error * weights).sum(-1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best


def round_columns(part: Tensor, upper: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Round some columns one by one, each hearing of the errors of those before.

    Args:
        part: float32 `[columns, rows]`, the weight's columns; overwritten.
        upper: float32 `[columns, columns]`, their part of U.
        scale: float32 `[columns, rows]`.
        low: the lowest code.
        high: the highest code.

    Returns:
        int8 codes and float32 errors over U's diagonal, `[columns, rows]` both.
    """
    codes, errors = torch.empty_like(part, dtype=torch.int8), torch.empty_like(part)
    for j in range(part.shape[0]):
        code = torch.round(part[j] / scale[j]).clamp_(low, high)
        codes[j] = code.to(torch.int8)
        errors[j] = (part[j] - code * scale[j]) / upper[j, j]
        part[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return codes, errors


def _step(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]:
    """`round_columns`, or its equal in Triton."""
    if device.type == "cuda" and TRITON:
        from bytelane.quantize import triton_gptq

        return triton_gptq.round_columns
    return round_columns


def gptq(weight: Tensor, scheme: WeightScheme, hessian: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Quantize a weight matrix so that its products with the inputs behind `hessian` change least.

    Args:
        weight: `[out, in]`, floating point.
        scheme: the width, and the group size where scales are per group.
        hessian: float32 `[in, in]`, `sum x^T x`.
        name: named in errors.

    Returns:
        int8 codes `[out, in]` and float32 scales `[out, groups]`.

    Raises:
        GroupSizeError, ScaleError, TensorShapeError: see `round_to_nearest`.
    """
    low, high = code_range(scheme.num_bits)
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean())
    if not mean > 0.0:  # the layer only ever read zeros; every rounding is as good
        return round_to_nearest(weight, scheme, name)
    scale = search_scales(weight, scheme, diagonal, name)
    order = torch.argsort(diagonal, descending=True)
    size = scheme.group_size or weight.shape[1]
    group_of = torch.arange(weight.shape[1], device=weight.device)[order] // size
    w = weight.detach().to(torch.float32)[:, order].clone()
    h = hessian[order][:, order].to(torch.float64)
    h += torch.diag(torch.full_like(h.diagonal(), DAMPING * mean))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).to(torch.float32)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    step = _step(weight.device)
    for start in range(0, w.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, w.shape[1])
        scales = scale[:, group_of[start:stop]].T.contiguous()
        part = w[:, start:stop].T.contiguous()
        found, errors = step(part, upper[start:stop, start:stop], scales, low, high)
        codes[:, order[start:stop]] = found.T
        w[:, stop:] -= errors.T @ upper[start:stop, stop:]
    return codes, scale
