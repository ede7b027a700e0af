"""Scales learned by the model's loss, codes as they are."""

from __future__ import annotations

import math

import pytest
import torch

from bytelane.models import load_model
from bytelane.quantize import LearningError, Recipe, learn_scales, observe, quantize_model, windows
from bytelane.quantize.rounding import dequantized, round_to_nearest
from bytelane.quantize.search import Divergence
from bytelane.quantize.settle import LEARNED
from bytelane.quantize.simulate import Simulation
from bytelane.scheme import WeightScheme
from calibration import linear_names, make_model


@pytest.fixture
def used(tokenizer, documents) -> list[torch.Tensor]:
    return windows(tokenizer, documents, length=24, limit=6)


def rounded(model, bits: int, group_size: int | None = None):
    """A copy of the model's layers rounded in place: codes and scales by name."""
    found = {}
    for name in linear_names(model)[:-1]:
        weight = model.get_submodule(name).weight
        found[name] = round_to_nearest(weight, WeightScheme(bits, group_size))
        with torch.no_grad():
            weight.copy_(dequantized(*found[name]))
    return found


@pytest.mark.parametrize("group_size", [None, 16])
def test_bad_scales_become_good_ones(used, group_size) -> None:
    """Ranges four times too wide and four times too narrow: learned, the model is nearer to the float one by far."""
    teacher, model = make_model(), make_model()
    names = linear_names(model)[:-1]
    seen = observe(teacher, used, names)
    wrong = [4.0, 0.25]
    inputs = {n: seen.inputs[n].amax() / 127 * wrong["mlp" in n] for n in names}
    outputs = {n: seen.outputs[n].amax() / 127 * wrong["mlp" not in n] for n in names}
    divergence = Divergence(model, used)
    codes = rounded(model, 4, group_size)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    steps: list[tuple[int, int]] = []
    learned = learn_scales(
        model,
        teacher,
        used,
        48,
        inputs,
        outputs,
        {n: scale for n, (_, scale) in codes.items()},
        shared=seen.shared,
        rate=0.1,
        progress=lambda *at: steps.append(at),
    )
    assert steps == [(i + 1, 48) for i in range(48)]
    assert len(learned.losses) == 48
    for group in seen.shared:
        assert len({learned.inputs[n] for n in group}) == 1
    # The model is as it was, and its layers compute as before.
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(
        p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), teacher.parameters(), strict=True)
    )
    losses = []
    for scales in ((inputs, outputs), (learned.inputs, learned.outputs)):
        with Simulation(model, *scales):
            losses.append(divergence())
    assert losses[1] < 0.5 * losses[0]
    # With the weight scales that were learned too, nearer still.
    with torch.no_grad():
        for name, (ints, _) in codes.items():
            assert learned.weights[name].shape == codes[name][1].shape
            model.get_submodule(name).weight.copy_(dequantized(ints, learned.weights[name]))
    with Simulation(model, learned.inputs, learned.outputs):
        assert divergence() < losses[1]


def test_gradients_are_those_of_the_loss(used) -> None:
    """One step of Adam moves every scale by its rate against the sign of a difference quotient."""
    teacher, model = make_model(), make_model()
    name = "model.layers.0.mlp.down_proj"
    scale = observe(teacher, used, [name]).outputs[name].amax() / 127
    steep = 40.0  # coarse enough that rounding and clipping are no noise
    learned = learn_scales(model, teacher, used[:1], 1, {}, {name: scale * steep}, {}, rate=0.02)
    losses = []
    divergence = Divergence(model, used[:1])
    for factor in (0.8, 1.25):
        with Simulation(model, {}, {name: scale * steep * factor}):
            losses.append(divergence())
    down = losses[0] < losses[1]
    assert learned.outputs[name] / (scale * steep) == pytest.approx(math.exp(-0.02 if down else 0.02), rel=1e-4)


def test_weight_scales_stay_where_their_rate_is_nothing(used) -> None:
    teacher, model = make_model(), make_model()
    codes = rounded(model, 4)
    weights = {n: s for n, (_, s) in codes.items()}
    scales = dict.fromkeys(codes, 0.05)
    learned = learn_scales(model, teacher, used, 2, scales, scales, weights, weight_rate=0.0)
    assert all(torch.equal(learned.weights[n], s) for n, s in weights.items())
    assert any(learned.inputs[n] != 0.05 for n in scales)


def test_a_loss_that_is_no_number_is_refused(used) -> None:
    teacher, model = make_model(), make_model()
    with torch.no_grad():
        teacher.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(LearningError, match="the loss of step 0 is nan; learn the scales in fewer steps"):
        learn_scales(model, teacher, used, 3, {linear_names(model)[0]: 0.05}, {}, {})
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    "more",
    [{}, {"rounding": "gptq", "granularity": {"layers": 16}, "rotate": True}, {"head": "full", "embeddings": 8}],
)
def test_a_recipe_that_learns_makes_a_nearer_checkpoint(tmp_path, tokenizer, documents, used, more) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distances, codes = [], []
    for steps in (0, 40):
        recipe = Recipe.of({"default_bits": 4, "range": "99", "learn_scales": steps, **more})
        stages: list[str] = []
        report = quantize_model(
            model,
            tokenizer,
            documents,
            recipe,
            tmp_path / str(steps),
            window=24,
            max_windows=6,
            progress=lambda stage, _, __, stages=stages: stages.append(stage),
        )
        loaded = load_model(tmp_path / str(steps))
        with torch.no_grad():
            p, q = (m(torch.stack(used)).logits.log_softmax(-1) for m in (model, loaded))
        distances.append(float((p.exp() * (p - q)).sum()))
        codes.append(loaded.get_submodule("model.layers.1.mlp.down_proj").packed)
    assert distances[1] < 0.9 * distances[0]
    assert torch.equal(*codes)
    assert "learn" in stages
    assert report.ranges == {LEARNED: sum(report.ranges.values())}
    assert all(0 <= layer.output_clipped <= 1 for layer in report.layers if layer.output_clipped is not None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
