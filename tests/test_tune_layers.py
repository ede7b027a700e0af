"""One layer in training: its values, its gradients, where its scales start; and the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import oracle
from bytelane.quantize import round_to_nearest
from bytelane.scheme import LinearScheme, WeightScheme, code_range
from bytelane.tune import TunedLinear, logits_loss
from bytelane.tune.fake import fake_quantize_int8, round_weight
from bytelane.tune.modules import log_scale
from bytelane.tune.ranges import start_weight_scale

# --- one layer ---------------------------------------------------------------------------------------------------


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def layer(bits: int, *, group_size: int | None = None, bias: bool = False, s_in: float | None = 0.03) -> TunedLinear:
    torch.manual_seed(bits)
    weight = nn.Parameter(torch.randn(20, 48) * 0.2)
    scheme = LinearScheme(WeightScheme(bits, group_size), quantize_input=s_in is not None)
    scale = start_weight_scale(weight, scheme.weight)
    return TunedLinear(
        weight,
        scale,
        scheme,
        log_input_scale=None if s_in is None else log_scale(s_in),
        log_output_scale=log_scale(0.04),
        bias=nn.Parameter(torch.randn(20)) if bias else None,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_evaluation_is_the_integer_layer_and_training_has_its_values(bits, bias) -> None:
    """48 products of 8-bit codes stay far below 2^24, so even training is exact."""
    made = layer(bits, bias=bias)
    x = torch.randn(5, 7, 48) * 2  # clipped here and there: 127 * 0.03 is 3.8
    made.eval()
    codes, scale = made.codes()
    expected = oracle.linear(
        x.reshape(-1, 48).numpy(),
        codes.numpy(),
        scale.numpy(),
        made.input_scale.item(),
        made.output_scale.item(),
        None if made.bias is None else made.bias.detach().numpy(),
    )
    evaluated = made(x)
    assert evaluated.reshape(-1, 20).numpy().tobytes() == expected.astype("float32").tobytes()
    made.train()
    assert torch.equal(made(x), evaluated)
    with torch.no_grad():
        made.log_weight_scale += 0.1
    made.eval()
    assert not torch.equal(made(x), evaluated)  # the integer layer is made anew


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_under_autocast_too_training_has_the_values_of_evaluation(bits, bias, device) -> None:
    made = layer(bits, bias=bias).to(device)
    x = (torch.randn(5, 7, 48) * 2).to(device, torch.bfloat16)
    evaluated = made.eval()(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        trained = made.train()(x)
        assert made(x.float()).dtype == torch.bfloat16  # as torch's own linear layers
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("s_in", [0.03, None])
def test_gradients_under_autocast_are_those_in_float32(s_in, device) -> None:
    made = layer(4, s_in=s_in, bias=True).to(device).train()
    # bfloat16 holds them: the gradient of an output that is cut off weighs 128, and must not be rounded before
    x, direction = (torch.randn(300, n, device=device).bfloat16().float() for n in (48, 20))
    found = []
    for mixed in (False, True):
        x.grad = None
        made.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            y = made(x.requires_grad_())
        (y * direction).sum().backward()
        found.append([p.grad.clone() for p in (x, *made.parameters())])
    # Without input codes the sums differ by up to a fifth of an output step, so what says which way an output was
    # rounded, its scale's gradient, is another; those by x and the weight are not.
    counted = None if s_in else 2
    for exact, mixed_one in zip(*(f[:counted] for f in found), strict=True):
        assert (mixed_one - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["linear", "linear_backward"])
def test_the_operations_of_training_pass_opcheck(name) -> None:
    made = layer(4, bias=True)
    x = torch.randn(6, 48)
    given = (made.log_weight_scale, made.log_input_scale, made.log_output_scale)
    held = [t.detach() for t in (x, made.weight, *given)]
    if name == "linear":
        arguments: tuple[Any, ...] = (*held, made.bias.detach(), -8, 7, torch.float32, False)
    else:
        _, codes, residual = torch.ops.bytelane_tune.linear(*held, made.bias.detach(), -8, 7, torch.float32, False)
        arguments = (torch.randn(6, 20), *held, codes, residual, -8, 7, False, True)
    torch.library.opcheck(getattr(torch.ops.bytelane_tune, name).default, arguments)


def test_groups_and_float_inputs_train_close_to_what_evaluates() -> None:
    for made in (layer(4, group_size=16), layer(4, s_in=None)):
        x = torch.randn(64, 48)
        trained = made.train()(x)
        evaluated = made.eval()(x)
        # The sums are rounded in another order, which moves a value by one output step where it lies on an edge.
        steps = ((trained - evaluated) / made.output_scale).abs().round()
        assert steps.max() <= 1
        assert (steps > 0).float().mean() < 0.01


def test_gradients_are_straight_through_and_lsq() -> None:
    """Against the same function written with detached roundings, which autograd differentiates by itself."""
    made = layer(4)  # a bias would be rounded to codes, which the other function does not do
    x = (torch.randn(40, 48) * 2).requires_grad_()
    direction = torch.randn(40, 20)
    parameters = [x, *made.parameters()]
    (made.train()(x) * direction).sum().backward()
    found = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None

    def quantized(v: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
        clamped = torch.clamp(v / scale, low - 0.5, high + 0.5)  # an edge rounds to the last code: still inside
        rounded = torch.clamp(torch.round(v / scale), low, high)
        return (clamped + (rounded - clamped).detach()) * scale

    low, high = code_range(4)
    wq = quantized(made.weight, made.log_weight_scale.exp(), low, high)
    xq = quantized(x, made.input_scale, -128, 127)
    y = quantized(xq @ wq.t(), made.output_scale, -128, 127)
    (y * direction).sum().backward()
    for p, got in zip(parameters, found, strict=True):
        # the saved output residual is bfloat16, relative 2^-8, and an output on an edge may fall on the other side
        assert (got - p.grad).norm() <= 0.01 * p.grad.norm()


def test_a_cache_scale_has_a_gradient() -> None:
    x = torch.tensor([0.26, -0.4, 30.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    y = fake_quantize_int8(x, scale)
    y.sum().backward()
    assert torch.allclose(y, torch.tensor([0.3, -0.4, 12.7]))
    assert x.grad.tolist() == [1, 1, 0]
    assert float(scale.grad) == pytest.approx(0.4 + 0 + 127, rel=2**-8)


def test_starting_scales_beat_those_that_clip_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    for scheme in (WeightScheme(2), WeightScheme(4, 32)):
        low, high = code_range(scheme.num_bits)

        def error(scale: torch.Tensor, low: int = low, high: int = high) -> torch.Tensor:
            codes, _ = round_weight(weight, scale, low, high)
            dense = codes.unflatten(1, (scale.shape[1], -1)) * scale[..., None]
            return (dense.flatten(1) - weight).square().sum(1)

        assert (error(start_weight_scale(weight, scheme)) < error(round_to_nearest(weight, scheme)[1])).all()


# --- the loss ----------------------------------------------------------------------------------------------------


def test_the_loss_and_its_gradient() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(30, 50, requires_grad=True), torch.randn(30, 50)
    labels = torch.randint(0, 50, (30,))
    loss = logits_loss(student, teacher, labels, kl_weight=0.7, text_weight=0.4)
    loss.backward()
    got = student.grad.clone()
    student.grad = None
    kl = nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    expected = 0.7 * kl + 0.4 * nn.functional.cross_entropy(student, labels)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(got, student.grad, atol=1e-6)
    with pytest.raises(ValueError, match="teacher's logits"):
        logits_loss(student, None, labels)
