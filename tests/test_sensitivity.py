"""What a rounding is expected to cost is what it costs: against the model's own divergence and its derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bytelane.quantize import Recipe, SensitivityError, make_plan, windows
from bytelane.quantize.resume import fingerprint
from bytelane.quantize.sensitivity import (
    Sensitivity,
    _gradients,
    candidates,
    measure,
    sampled_gradient,
    shared_inputs,
    squared_products,
    try_out,
)
from calibration import make_documents, make_model, make_tokenizer

WINDOWS = windows(make_tokenizer(), make_documents(), length=24, limit=12)


def loud_model() -> nn.Module:
    """Weights that matter, in float64: an untrained model's predictions hardly depend on them."""
    model = make_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    return model


def divergence(model: nn.Module, changes: dict[str, Tensor], used: list[Tensor]) -> float:
    """KL in nats a token between the model and itself with these weights."""
    batch = torch.stack(used)
    with torch.no_grad():
        before = model(batch).logits.log_softmax(-1)
        after = torch.func.functional_call(model, changes, (batch,)).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum()) / batch.numel()


def second_order(model: nn.Module, name: str, change: Tensor, window: Tensor) -> float:
    """`1/2 sum_t Var_p(u_t)`, u the logits' derivative along the change: the second-order divergence, summed."""

    def logits(weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: weight}, (window[None],)).logits[0]

    weight = model.get_parameter(name).detach()
    z, u = torch.func.jvp(logits, (weight,), (change,))
    p, u = z.detach().softmax(-1), u.detach()
    return float(0.5 * ((p * u * u).sum(-1) - (p * u).sum(-1).square()).sum())


def test_gradients_of_drawn_tokens_give_the_divergence() -> None:
    model, window = loud_model(), WINDOWS[0][:10]
    model.set_attn_implementation("eager")  # torch has no forward derivatives of the others
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach()
    change = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = second_order(model, name, change, window)
    true = divergence(model, {name: weight + change}, [window]) * window.numel()
    assert true == pytest.approx(exact, rel=0.02)  # what is left is of third order in a change of a thousandth
    draws, products = 200, []
    with _gradients(model, {name.removesuffix(".weight"): lambda _, g: products.append(float((g * change).sum()))}):
        assert sum(sampled_gradient(model, window, seed) for seed in range(draws)) == draws * window.numel()
    found = 0.5 * sum(p * p for p in products) / draws
    # A product is a sum over ten drawn tokens, nearly normal: its square's mean over n draws is known to sqrt(2 / n).
    assert found == pytest.approx(exact, rel=4 * math.sqrt(2 / draws))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_squared_products_are_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 6, 8, generator=generator).unbind(0)
    codes = torch.randint(-8, 8, (6, 8), generator=generator, dtype=torch.int8)
    scale = torch.rand(6, 2, generator=generator)
    error = codes.float() * scale.repeat_interleave(4, 1) - weight
    expected = sum(float(gradient[r] @ error[r]) ** 2 for r in range(6))
    assert squared_products(weight, gradient, codes, scale) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_each_layers_loss_is_the_models(rounding: str) -> None:
    """Every module, at every width: within what one rounding's chances and 12 windows' draws leave."""
    model = loud_model()
    plan = make_plan(model, Recipe.of({"embeddings": 8}))
    widths = {m.name: (4, 6, 8) for m in plan.modules}
    rounded = candidates(model, WINDOWS, plan.modules, widths, rounding=rounding)
    assert set(rounded) == {m.name for m in plan.modules}
    found = Sensitivity()
    list(measure(model, WINDOWS, rounded, found))
    assert found.windows == 12
    assert found.tokens == 12 * 24
    ratios = []
    for name, made in rounded.items():
        losses = found.losses(name)
        assert losses[4] > losses[6] > losses[8] > 0
        for bits, (codes, scale) in made.items():
            true = divergence(model, {f"{name}.weight": codes.double() * scale.double()}, WINDOWS)
            ratios.append(losses[bits] / true)
    logs = torch.tensor(ratios).log()
    # A window's sum of some 64 squares is known to sqrt(2 / 64), twelve of them to 5 %; the rows that one rounding
    # happens to move together add a few tens of percent to single layers, which average out.
    assert abs(float(logs.mean())) < math.log(1.2)
    assert float(logs.abs().max()) < math.log(2)


def test_a_trial_sets_what_gradients_expect_right() -> None:
    """At the width that is tried the losses of a group are its divergence, exactly; weights are as before."""
    model = loud_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    modules = [m for m in make_plan(model, Recipe()).modules if m.name in names]
    rounded = candidates(model, WINDOWS, modules, dict.fromkeys(names, (3, 8)), rounding="nearest")
    found = Sensitivity()
    list(measure(model, WINDOWS, rounded, found))
    expected = found.losses(names[0])
    list(try_out(model, WINDOWS[:3], [names], rounded, 3, found))
    changes = {f"{n}.weight": codes.double() * scale for n, (codes, scale) in ((n, rounded[n][3]) for n in names)}
    true = divergence(model, changes, WINDOWS[:3])
    assert sum(found.losses(n)[3] for n in names) == pytest.approx(true, rel=1e-3)
    assert found.losses(names[0])[8] == pytest.approx(expected[8] * found.factors[names[0]], rel=1e-3)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert list(try_out(model, WINDOWS[:3], [names], rounded, 3, found)) == []  # known


def test_layers_that_read_one_tensor_are_found() -> None:
    model = make_model()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    groups = shared_inputs(model, WINDOWS[0], names)
    leaves = [tuple(n.rpartition(".")[2] for n in g) for g in groups]
    assert leaves == 2 * [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def test_a_measurement_goes_on_where_it_ended(tmp_path) -> None:
    model = loud_model()
    plan = make_plan(model, Recipe())
    rounded = candidates(model, WINDOWS, plan.modules, {m.name: (3, 8) for m in plan.modules}, rounding="nearest")
    whole, file, of = Sensitivity(), tmp_path / "losses.json", fingerprint(model, WINDOWS, "r")
    list(measure(model, WINDOWS[:5], rounded, whole))
    first = Sensitivity.load(file, of)
    steps = measure(model, WINDOWS[:5], rounded, first)
    next(steps), next(steps)
    first.save(file, of)
    steps.close()
    assert all(p.requires_grad for p in model.parameters())
    again = Sensitivity.load(file, of)
    assert again.windows == 2
    again.factors = {"x": 2.0}
    again.save(file, of)
    assert Sensitivity.load(file, of) == again
    again.factors = {}
    list(measure(model, WINDOWS[:5], rounded, again))
    assert again == whole
    with pytest.raises(SensitivityError, match=r"losses\.json: its losses are of another model"):
        Sensitivity.load(file, fingerprint(model, WINDOWS[1:], "r"))
    file.write_text('{"sums": 3}')
    with pytest.raises(SensitivityError, match=r"losses\.json: no file of measured losses"):
        Sensitivity.load(file, of)


def test_what_losses_are_of_changes_with_all_it_hangs_on() -> None:
    model, other = make_model(), make_model(seed=1)
    prints = {
        fingerprint(model, WINDOWS),
        fingerprint(other, WINDOWS),
        fingerprint(model, WINDOWS[:-1]),
        fingerprint(model, WINDOWS, "x"),
    }
    assert len(prints) == 4
    assert fingerprint(make_model(), WINDOWS) in prints
