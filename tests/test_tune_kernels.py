"""The Triton kernels of training against the same functions in torch.

Forward they are equal to the bit. Sums are added in another order, so a scale's gradient agrees to float32 rounding.
On a machine without a GPU the file runs once more in Triton's interpreter, as `test_triton.py` does.
"""

import pytest
import torch

from interpreted import DEVICE, elsewhere, kernels, run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

from bytelane.tune import fake, triton_fake
from bytelane.tune.loss import _row_losses

RANGES = [(-128, 127), (-8, 7), (-2, 1)]


@elsewhere
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def values(*shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers, some of them on the edges between codes of a scale that is a power of two."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * spread
    x.view(-1)[::3] = (x.view(-1)[::3] * 16).round() / 16
    return x.to(dtype).to(DEVICE)


def close(found: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor) -> None:
    """Two sums of the same float32 terms in different orders."""
    bound = 2.0**-23 * terms.numel() ** 0.5 * terms.abs().sum() + 1e-30
    assert (found - expected).abs().max() <= bound


@kernels
@pytest.mark.parametrize("low_high", RANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs(low_high, dtype) -> None:
    x = values(37, 150, spread=0.125 * low_high[1] + 0.1, dtype=dtype)
    for scale in (0.125, 0.0713):
        reciprocal = torch.tensor(scale, device=DEVICE).reciprocal()
        expected = fake.input_codes(x, reciprocal, *low_high, torch.bfloat16)
        assert torch.equal(triton_fake.input_codes(x, reciprocal, *low_high, torch.bfloat16), expected)
        gradient = values(37, 150, dtype=torch.bfloat16)
        to_x, by_scale = fake.through_input(gradient, x, reciprocal, *low_high)
        got_x, got_scale = triton_fake.through_input(gradient, x, reciprocal, *low_high)
        assert torch.equal(got_x, to_x)
        assert 0 < (to_x == 0).float().mean() < 1
        close(got_scale, by_scale, gradient.float() * low_high[1])


@kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs(bias, dtype) -> None:
    acc = (values(70, 100) * 4000).round()
    ratio = values(100, spread=0.01).abs() + 0.01
    ratio[::2] = 2.0**-6
    added = (values(100) * 500).round() if bias else None
    scale = torch.tensor(0.037, device=DEVICE)
    y, residual = fake.requantize(acc, ratio, added, scale, -128, 127, dtype)
    got_y, got_residual = triton_fake.requantize(acc, ratio, added, scale, -128, 127, dtype)
    assert torch.equal(got_y, y)
    assert torch.equal(got_residual, residual)
    gradient = values(70, 100, dtype=dtype)
    to_acc, by_scale = fake.through_output(gradient, residual, torch.bfloat16)
    got_acc, got_scale = triton_fake.through_output(gradient, residual, torch.bfloat16)
    assert torch.equal(got_acc, to_acc)
    close(got_scale, by_scale, gradient.float() * residual.float())


@kernels
@pytest.mark.parametrize("low_high", RANGES, ids=str)
def test_weights(low_high) -> None:
    weight = values(11, 1500, spread=0.2)
    scale = values(11, 1, spread=0.02).abs() + 0.2 / low_high[1]
    scale[::2] = 2.0**-4
    for scaled in (False, True):
        expected = fake.weight_operand(weight, scale, *low_high, scaled=scaled, dtype=torch.bfloat16)
        found = triton_fake.weight_operand(weight, scale, *low_high, scaled=scaled, dtype=torch.bfloat16)
        assert torch.equal(found, expected)
    gradient, factor = values(11, 1500), torch.tensor(0.31, device=DEVICE)
    to_weight, by_scale = fake.through_weight(gradient, weight, scale, factor, *low_high)
    got_weight, got_scale = triton_fake.through_weight(gradient, weight, scale, factor, *low_high)
    assert torch.equal(got_weight, to_weight)
    close(got_scale, by_scale, gradient[0] * low_high[1])


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kl_weight", "text_weight"), [(1.0, 0.0), (0.7, 0.4), (0.0, 1.0)])
def test_losses(kl_weight, text_weight, dtype) -> None:
    student, teacher = values(9, 5000, spread=3, dtype=dtype), values(9, 5000, spread=2, dtype=dtype)
    labels = torch.tensor([0, 4999, 17, 4096, 4095, -1, 3, 2, -1], device=DEVICE)
    given = teacher if kl_weight else None
    losses, gradient = _row_losses(student, given, labels, kl_weight, text_weight)
    got_losses, got_gradient = triton_fake.row_losses(student, given, labels, kl_weight, text_weight)
    # Logits below 16 in size have rounding errors below 2^-20, and so have the logarithms of their sums.
    assert torch.allclose(got_losses, losses, rtol=0, atol=2.0**-16)
    assert torch.allclose(got_gradient.float(), gradient.float(), rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-4)
