"""GPTQ's loop in Triton against the one in torch: the same codes and the same errors, to the bit.

On a machine without a GPU the file runs once more in Triton's interpreter, as `test_triton.py` does.
"""

import pytest
import torch

from interpreted import DEVICE, GPU, elsewhere, kernels, run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

from bytelane.quantize import gptq, triton_gptq
from bytelane.quantize.gptq import round_columns
from bytelane.scheme import WeightScheme


@elsewhere
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (7, 33), (48, 40)])
def test_columns_are_rounded_as_in_torch(bits, columns, rows) -> None:
    torch.manual_seed(columns)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = torch.rand(columns, rows) * 0.1 + 0.01
    # half steps, and values beyond the range
    part = torch.randint(3 * low, 3 * high + 1, (columns, rows)) * 0.5 * scale
    part[::2] += torch.randn(part[::2].shape) * 0.1
    upper = torch.randn(columns, columns).triu(1) * 0.3 + torch.diag(torch.rand(columns) + 0.5)
    expected = round_columns(part.clone().to(DEVICE), upper.to(DEVICE), scale.to(DEVICE), low, high)
    found = triton_gptq.round_columns(part.to(DEVICE), upper.to(DEVICE), scale.to(DEVICE), low, high)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert {low, high} <= set(found[0].flatten().tolist()) or columns < 48


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("group_size", [None, 32])
def test_a_matrix_on_the_gpu_is_as_good_as_on_the_cpu(group_size) -> None:
    """The Cholesky factors differ by rounding, which moves a code where it lies on an edge, and those after it."""
    torch.manual_seed(0)
    weight = torch.randn(70, 320) * 0.1
    x = torch.randn(1000, 320) @ torch.randn(320, 320)
    hessian = x.T @ x
    losses = []
    for device in ("cpu", "cuda"):
        codes, scale = gptq(weight.to(device), WeightScheme(4, group_size), hessian.to(device))
        grouped = codes.cpu().float().reshape(70, scale.shape[1], -1) * scale.cpu()[..., None]
        losses.append(float((x @ (grouped.reshape(70, 320) - weight).T).square().sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
