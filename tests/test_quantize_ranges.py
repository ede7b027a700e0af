"""Observed activations and the ranges made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bytelane.numerics import quantize
from bytelane.quantize import CalibrationError, ResumeError, observe, search_ranges, windows
from bytelane.quantize.observe import Statistics, range_scale
from bytelane.quantize.resume import ObservationFile, fingerprint
from bytelane.quantize.search import TRIED, Divergence, loudness
from bytelane.quantize.simulate import Simulation
from calibration import linear_names, make_model

BFLOAT16_HALF_STEP = 2.0**-8
"""Rounding to 8 significant bits moves a value by at most half a step: a relative 2^-8."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 99.99])
def test_percentiles_agree_with_quantile_within_a_bin(dtype, percent) -> None:
    torch.manual_seed(1)
    x = (torch.randn(40000) * torch.exp(2 * torch.randn(40000))).to(dtype)
    parts = Statistics()
    for part in x.split(7000):
        parts.add(Statistics.of(part, histogram=True))
    # The order statistic of rank ceil(n * p): with `higher` interpolation quantile takes rank ceil((n-1) * p) + 1,
    # which is the same or one more, so both neighbours bound it.
    ordered = x.abs().float().sort().values
    exact = float(ordered[math.ceil(len(x) * percent / 100) - 1])
    around = [float(torch.quantile(ordered, percent / 100, interpolation=i)) for i in ("lower", "higher")]
    assert around[0] <= exact <= around[1] or exact in around
    tolerance = 0.0 if dtype is torch.bfloat16 else exact * BFLOAT16_HALF_STEP
    assert abs(parts.percentile(percent) - exact) <= tolerance
    clipped = float((x.abs().float() > exact).float().mean())
    if dtype is torch.bfloat16:
        assert parts.clipped(exact) == pytest.approx(clipped, abs=1e-7)
    assert parts.clipped(parts.amax()) == 0
    assert parts.amax() == float(ordered[-1])


def test_a_range_becomes_a_scale() -> None:
    assert range_scale(254.0, "m", "input").item() == 2.0
    assert range_scale(254.0, "m", "input").dtype == torch.float32
    with pytest.raises(CalibrationError, match=r"m: the range of its output is 0.0.*no_output"):
        range_scale(0.0, "m", "output")


def test_layers_that_read_one_tensor_share_its_range(tokenizer, documents) -> None:
    model = make_model()
    used = windows(tokenizer, documents, length=24, limit=5)
    names = linear_names(model)[:-1]
    seen = observe(model, used, names, input_histograms=names, output_histograms=names)
    expected = []
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        expected.append(tuple(attention + n for n in ("q_proj", "k_proj", "v_proj")))
        expected.append(tuple(mlp + n for n in ("gate_proj", "up_proj")))
    assert set(seen.shared) == set(expected)
    assert seen.tokens == 5 * 24
    q, k = (seen.inputs[expected[0][j]] for j in (0, 1))
    assert q is k
    assert q.count == 5 * 24 * 64  # once for the tensor, not once for each reader
    assert int(q.histogram.sum()) == q.count

    direct: dict[str, list[torch.Tensor]] = {}
    target = model.get_submodule(expected[1][0])

    def keep(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        direct.setdefault("in", []).append(args[0].flatten())
        direct.setdefault("out", []).append(output.flatten())

    handle = target.register_forward_hook(keep)
    with torch.no_grad():
        for window in used:
            model(window[None])
    handle.remove()
    for side, found in (("in", seen.inputs), ("out", seen.outputs)):
        x = torch.cat(direct[side])
        assert (found[expected[1][0]].low, found[expected[1][0]].high) == (float(x.min()), float(x.max()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Branches(nn.Module):
    """Two layers that read one tensor, a third that reads it after a write in place, one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = input_ids[0].float().expand(4).clone()
        y = self.a(x) + self.b(input=x)
        x += 1
        return y + self.c(x)


def test_sharing_is_by_identity_and_version() -> None:
    model = Branches()
    used = [torch.tensor([i]) for i in range(3)]
    seen = observe(model, used, ["a", "b", "c"])
    assert seen.shared == (("a", "b"),)
    assert (seen.inputs["a"].high, seen.inputs["c"].high) == (2.0, 3.0)  # before and after the write in place
    assert seen.inputs["a"].histogram is None
    mixed = observe(model, used, ["a", "b", "c"], input_histograms=["b"])
    assert int(mixed.inputs["a"].histogram.sum()) == mixed.inputs["a"].count == 12
    with pytest.raises(CalibrationError, match=r"never reached 1 layer\(s\), first d"):
        observe(model, used, ["a", "d"])


def test_non_finite_activations_name_the_layer() -> None:
    model = Branches()
    nn.init.constant_(model.b.bias, math.inf)
    with pytest.raises(CalibrationError, match="b: its output holds NaN or infinity"):
        observe(model, [torch.tensor([1])], ["a", "b"])
    assert not model.a._forward_hooks


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_least_squares_agrees_with_trying_every_range(spread) -> None:
    torch.manual_seed(0)
    x = (torch.randn(60000) * torch.exp(spread * torch.randn(60000))).to(torch.bfloat16).float()
    found = Statistics.of(x, histogram=True).least_squares()

    def error(limit: float) -> float:
        step = limit / 127
        return float(((torch.round(x / step).clamp(-127, 127) * step - x).double() ** 2).mean())

    grid = [float(x.abs().max()) * 2.0 ** (-k / 8) for k in range(96)]
    best = min(grid, key=error)
    # The formula takes the rounding error as uniform; what it costs against the best of the same ranges is little.
    assert error(found) <= 1.02 * error(best)
    assert found in grid
    if spread == 3.0:
        assert error(found) < 0.5 * error(grid[0]) or found == grid[0]


def test_simulated_sides_round_as_the_integer_layer_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(5, 8) * 3
    with Simulation(model, {"0": 0.03}, {"0": 0.02}) as simulation:
        found = model(x)
        del simulation.outputs["0"]
        free = model(x)
    q = quantize(x, torch.tensor(0.03))
    expected = nn.functional.linear(q.float() * 0.03, model[0].weight, model[0].bias)
    assert torch.allclose(free, expected, atol=1e-6)
    assert torch.equal(torch.round(found / 0.02), torch.clamp(torch.round(free / 0.02), -128, 127))
    assert not model[0]._forward_hooks
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_search_finds_the_range_that_a_sink_needs(tokenizer, documents) -> None:
    """The loss under what is chosen is the least of those tried, and skipping the layers before changes no loss."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] *= 300
    used = windows(tokenizer, documents, length=24, limit=2)
    names = linear_names(model)[:-1]
    seen = observe(model, used, names, input_histograms=names, output_histograms=names)
    inputs = {n: s.amax() / 127 for n, s in seen.inputs.items()}
    outputs = {n: s.amax() / 127 for n, s in seen.outputs.items()}
    steps: list[tuple[int, int]] = []
    choices = search_ranges(model, used, seen, inputs, outputs, 3, progress=lambda *step: steps.append(step))
    assert len(choices) == 3
    assert steps[-1] == (3 * TRIED, 3 * TRIED)
    assert steps == sorted(steps)
    tensors = {id(s): loudness(s) for s in (*seen.inputs.values(), *seen.outputs.values())}
    of = {"input": seen.inputs, "output": seen.outputs}
    assert sorted(loudness(of[c.side][c.names[0]]) for c in choices) == sorted(tensors.values())[-3:]
    assert {("model.layers.1.mlp.up_proj",), ("model.layers.1.mlp.down_proj",)} <= {c.names for c in choices}
    order = [n for c in choices for n in c.names]
    assert [names.index(n) for n in order] == sorted(names.index(n) for n in order)
    for choice in choices:
        assert choice.losses[choice.limit] == min(choice.losses.values())
    # The last one searched was judged with everything else as chosen: the whole model gives the same loss.
    for choice in choices:
        (inputs if choice.side == "input" else outputs).update(dict.fromkeys(choice.names, choice.limit / 127))
    divergence = Divergence(model, used)
    assert divergence() == 0.0
    with Simulation(model, inputs, outputs):
        assert divergence() == pytest.approx(choices[-1].losses[choices[-1].limit], abs=1e-6)
    assert "forward" not in vars(model.model.layers[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def killed_after(model: nn.Module, windows: list[torch.Tensor], names: list[str], resume: ObservationFile) -> None:
    def read():
        yield from windows
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(model, read(), names, input_histograms=names[:4], output_histograms=names[2:], resume=resume)


def same_statistics(a: Statistics, b: Statistics) -> bool:
    bins = (a.histogram is None and b.histogram is None) or torch.equal(a.histogram, b.histogram)
    return bins and (a.low, a.high, a.count) == (b.low, b.high, b.count)


def test_a_killed_observation_goes_on(tmp_path, tokenizer, documents) -> None:
    model = make_model()
    used = windows(tokenizer, documents, length=24, limit=6)
    names = linear_names(model)[:-1]
    kinds = {"input_histograms": names[:4], "output_histograms": names[2:]}
    whole = observe(model, used, names, **kinds)
    of = fingerprint(model, used, "a recipe")
    file = tmp_path / "deep" / "observed.safetensors"
    killed_after(model, used[:4], names, ObservationFile(file, of, seconds=0))
    read: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: read.append(1))
    resumed = observe(model, used, names, **kinds, resume=ObservationFile(file, of))
    assert len(read) == 2
    again = observe(model, used, names, **kinds, resume=ObservationFile(file, of))
    assert len(read) == 2  # all of it was kept
    handle.remove()
    for found in (resumed, again):
        assert (found.shared, found.tokens) == (whole.shared, whole.tokens)
        for name in names:
            assert same_statistics(found.inputs[name], whole.inputs[name])
            assert same_statistics(found.outputs[name], whole.outputs[name])
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_pass_that_was_cut_short_is_not_counted(tmp_path) -> None:
    model = Branches()
    used = [torch.tensor([1]), torch.tensor([2])]
    file = tmp_path / "observed"
    of = fingerprint(model, used)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.c.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        observe(model, used, ["a", "b", "c"], resume=ObservationFile(file, of, seconds=0))
    assert not file.exists()
    handle.remove()
    seen = observe(model, used, ["a", "b", "c"], resume=ObservationFile(file, of, seconds=0))
    assert seen.outputs["a"].count == seen.outputs["c"].count == 8


def test_observations_of_something_else_are_refused(tmp_path, tokenizer, documents) -> None:
    model = make_model()
    used = windows(tokenizer, documents, length=24, limit=3)
    names = linear_names(model)[:-1]
    file = tmp_path / "observed.safetensors"
    of = fingerprint(model, used, "a recipe")
    observe(model, used, names, resume=ObservationFile(file, of))
    others = [
        fingerprint(model, used, "another recipe"),
        fingerprint(model, used[:2], "a recipe"),
        fingerprint(make_model(seed=1), used, "a recipe"),
    ]
    assert len({of, *others}) == 4
    for other in others:
        with pytest.raises(ResumeError, match="of another model, text or recipe"):
            observe(model, used, names, resume=ObservationFile(file, other))
    data = file.read_bytes()
    for broken in (
        b"",
        data[:-1],
        b"{}",
        data.replace(b"counts", b"counting"),
        data.replace(b'"windows"', b'"widows"'),
    ):
        file.write_bytes(broken)
        with pytest.raises(ResumeError, match="no file of observations"):
            observe(model, used, names, resume=ObservationFile(file, of))
    file.write_bytes(data)
    with pytest.raises(ResumeError, match="no such side"):
        observe(model, used, names[:3], resume=ObservationFile(file, of))
