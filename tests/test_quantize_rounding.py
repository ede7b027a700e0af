"""Weights to codes."""

from __future__ import annotations

import math

import pytest
import torch

from bytelane.errors import ScaleError
from bytelane.quantize import Hessian, gptq, round_to_nearest
from bytelane.quantize.gptq import DAMPING, corrected_bias, search_scales
from bytelane.scheme import WeightScheme, code_range


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16])
def test_rounding_is_nearest_and_clips_nothing(num_bits, group_size) -> None:
    torch.manual_seed(num_bits)
    weight = torch.randn(40, 48) * torch.logspace(-4, 3, 40)[:, None]
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    scheme = WeightScheme(num_bits, group_size)
    codes, scale = round_to_nearest(weight, scheme)
    low, high = code_range(num_bits)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert tuple(scale.shape) == (40, scheme.groups(48))
    w, c, s = (t.to(torch.float64) for t in (weight.reshape(40, -1, group_size or 48), codes, scale[..., None]))
    c = c.reshape(w.shape)
    # Half a step, and the float32 rounding of the scale and of the division: two roundings of at most 2^-24 of |w / s|.
    assert ((c * s - w).abs() <= s * (0.5 + 2 * 2**-24 * 2**num_bits)).all()
    smaller = s * (1 - 2.0**-20)
    clips = ((w / smaller).amax(-1) > high) | ((w / smaller).amin(-1) < low)
    assert clips.all()  # no smaller scale covers the row


def test_rows_of_zeros_and_bad_weights() -> None:
    weight = torch.zeros(3, 8)
    codes, scale = round_to_nearest(weight, WeightScheme(4))
    assert not codes.any()
    assert (scale == 1).all()
    weight[1] = 7.0
    weight[2] = 1e-40  # its scale would be subnormal
    codes, scale = round_to_nearest(weight, WeightScheme(4))
    assert scale.flatten().tolist() == [1.0, 1.0, 1.0]
    assert codes[1].tolist() == [7] * 8
    assert not codes[[0, 2]].any()
    with pytest.raises(ScaleError, match="q_proj: a weight is NaN or infinite"):
        round_to_nearest(torch.tensor([[1.0, math.nan]]), WeightScheme(8), "q_proj")


# --- GPTQ --------------------------------------------------------------------------------------------------------


def correlated_inputs(seed: int, tokens: int, width: int) -> torch.Tensor:
    """Inputs whose channels say much about one another, some of them loud."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 4, width, generator=generator)
    x = torch.randn(tokens, width // 4, generator=generator) @ mix
    return (x + 0.3 * torch.randn(tokens, width, generator=generator)) * torch.logspace(-1, 1, width)


def product_error(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> float:
    grouped = codes.double().reshape(codes.shape[0], scale.shape[1], -1) * scale.double()[..., None]
    return float((x.double() @ (weight.double() - grouped.reshape(weight.shape)).T).square().sum())


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16])
def test_gptq_keeps_products_better_than_rounding(num_bits, group_size) -> None:
    torch.manual_seed(num_bits)
    weight, x = torch.randn(24, 48), correlated_inputs(num_bits, 400, 48)
    scheme = WeightScheme(num_bits, group_size)
    hessian = Hessian(48)
    for part in x.split(90):
        hessian.add(part[None])
    assert hessian.tokens == 400
    codes, scale = gptq(weight, scheme, hessian.sum)
    low, high = code_range(num_bits)
    assert codes.dtype == torch.int8
    assert tuple(scale.shape) == (24, scheme.groups(48))
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    nearest = product_error(weight, *round_to_nearest(weight, scheme), x)
    # With the very same scales as well, so that the gain is not the scale search's alone.
    grouped = weight.reshape(24, scale.shape[1], -1)
    same = torch.round(grouped / scale[..., None]).clamp(low, high).to(torch.int8).reshape(24, 48)
    assert product_error(weight, codes, scale, x) < 0.7 * min(nearest, product_error(weight, same, scale, x))


def test_gptq_follows_the_definition_column_by_column() -> None:
    """The blocked form against the textbook's: eliminate one column of the inverse at a time, in float64."""
    torch.manual_seed(0)
    weight, x = torch.randn(6, 160), correlated_inputs(1, 500, 160)
    scheme = WeightScheme(4)
    hessian = Hessian(160)
    hessian.add(x)
    codes, scale = gptq(weight, scheme, hessian.sum)
    diagonal = hessian.sum.diagonal()
    inverse = torch.linalg.inv(hessian.sum.double() + torch.eye(160) * DAMPING * float(diagonal.mean()))
    w, left = weight.double().clone(), torch.argsort(diagonal, descending=True).tolist()
    expected = torch.zeros(6, 160, dtype=torch.int64)
    while left:
        j = left.pop(0)
        expected[:, j] = torch.round(w[:, j] / scale[:, 0].double()).clamp(-8, 7).long()
        error = (w[:, j] - expected[:, j] * scale[:, 0].double()) / inverse[j, j]
        w[:, left] -= error[:, None] * inverse[j, left]
        inverse -= inverse[:, j, None] * inverse[None, j, :] / inverse[j, j]
    # float32 error feedback may tip a value that lies within its rounding of a half step; then later columns follow.
    assert (expected != codes).double().mean() < 0.01


def test_a_corrected_bias_takes_what_is_left_of_the_mean() -> None:
    """With inputs that are clipped and noisy, and tokens that weigh differently."""
    torch.manual_seed(0)
    weight, exact = torch.randn(24, 48), correlated_inputs(0, 400, 48) + 0.5
    rounded = torch.round(weight * 4) / 4
    x = (exact + 0.3 * torch.randn(400, 48)).clamp(-4, 4)
    loud = torch.rand(400) + 0.1
    hessian, scaled = Hessian(48), Hessian(48)
    for rows, wanted, factor in zip(x.split(90), exact.split(90), loud.split(90), strict=True):
        hessian.add(rows[None], wanted[None], factor[None])
    scaled.add(x * loud[:, None])
    assert torch.allclose(hessian.sum, scaled.sum, rtol=1e-5, atol=1e-3)
    given = torch.randn(24)
    shifted = corrected_bias(given, weight, rounded, hessian)
    gap = x.double() @ rounded.double().T + (shifted - given).double() - exact.double() @ weight.double().T
    squares = loud.double().square()[:, None]
    assert float(((gap * squares).sum(0) / squares.sum()).abs().max()) < 1e-4


def test_inputs_that_are_the_float_models_correct_nothing() -> None:
    weight, x = torch.randn(8, 16), torch.randn(40, 16)
    same = Hessian(16)
    same.add(x, x)
    assert torch.allclose(corrected_bias(torch.ones(8), weight, weight, same), torch.ones(8), atol=1e-5)


def test_gptq_of_inputs_that_are_uncorrelated_is_rounding_to_nearest() -> None:
    torch.manual_seed(3)
    weight, scheme = torch.randn(8, 32), WeightScheme(8)
    codes, scale = gptq(weight, scheme, torch.eye(32))
    assert torch.equal(codes, torch.round(weight / scale).clamp(-128, 127).to(torch.int8))


def test_gptq_of_a_layer_that_reads_zeros_is_rounding_to_nearest() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(
        gptq(weight, WeightScheme(4), torch.zeros(32, 32)), round_to_nearest(weight, WeightScheme(4)), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("group_size", [None, 8])
def test_searched_scales_have_the_least_weighted_error_of_those_tried(group_size) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(5, 16), torch.rand(16)
    scheme = WeightScheme(3, group_size)
    found = search_scales(weight, scheme, importance)
    largest = round_to_nearest(weight, scheme)[1]
    assert bool((found <= largest).all())

    def errors(scale: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(5, scale.shape[1], -1)
        rounded = torch.round(grouped / scale[..., None]).clamp(-4, 3) * scale[..., None]
        return ((rounded - grouped).square() * importance.reshape(1, scale.shape[1], -1)).sum(-1)

    for factor in (1.0, 0.9, 0.8, 0.5):  # of the 33 tried: 1 - i * 0.02
        assert bool((errors(found) <= errors(largest * factor) * (1 + 1e-5)).all())
    assert bool((errors(found) < errors(largest)).any())
