"""Comparing two models: every figure against its definition, in lockstep and out of order, and the command."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import oracle
import tiny
from bytelane import errors
from bytelane.layers import QuantLinear
from bytelane.models import load_model
from bytelane.report.compare import compare_models, sensitivity, standard_error
from bytelane.report.findings import comparison_json, findings
from bytelane.report.lockstep import Lockstep
from bytelane.report.measures import SideSums
from bytelane.report.subject import Subject, sample_text
from bytelane.scheme import LinearScheme, WeightScheme
from test_cli import byte_tokenizer, call, call_json

GEMMA = str(Path(__file__).parent / "data" / "gemma4-tiny-mobile")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny float model and a checkpoint of the same architecture, with a tokenizer each."""
    root = tmp_path_factory.mktemp("compare")
    config = tiny.config("llama", vocab_size=300)
    tiny.float_model(config).save_pretrained(root / "float")
    plan = {n: LinearScheme(WeightScheme(8), quantize_output="down" not in n) for n in tiny.linear_names(config)}
    tiny.write_random(root / "quantized", config, plan)
    for name in ("float", "quantized"):
        byte_tokenizer().save_pretrained(root / name)
    return root / "float", root / "quantized"


def some_windows(count: int = 3, length: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator) for _ in range(count)]


def outputs_of(
    model: nn.Module, window: torch.Tensor
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Inputs and outputs of every linear layer, by plain hooks."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        m.register_forward_hook(lambda _, args, y, n=n: kept.update({n: (args[0][0].clone(), y[0].clone())}))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | QuantLinear)
    ]
    with torch.inference_mode():
        logits = model(window[None]).logits[0]
    for handle in handles:
        handle.remove()
    return kept, logits


def test_every_figure_is_its_definition(folders: tuple[Path, Path]) -> None:
    a, b = Subject.parse(str(folders[0])).load(torch.float32), load_model(folders[1])
    used = some_windows()
    result = compare_models(a, b, used)
    seen = [(outputs_of(a, w), outputs_of(b, w)) for w in used]
    assert [layer.name for layer in result.layers] == list(seen[0][0][0])
    for layer in result.layers:
        module = b.get_submodule(layer.name)
        for which, side in ((0, layer.input), (1, layer.output)):
            left = torch.cat([first[layer.name][which] for (first, _), _ in seen]).double()
            right = torch.cat([second[layer.name][which] for _, (second, _) in seen]).double()
            noise = float((left - right).square().sum())
            sqnr = 10 * math.log10(float(left.square().sum()) / noise) if noise else None
            # float32 squares summed in float64: each errs by 2^-24 of itself, so the ratio by 2^-22 and the dB by 1e-6
            assert side.sqnr == pytest.approx(sqnr, abs=2e-6)
            assert (side.a.low, side.a.high) == (left.min(), left.max())
            assert side.a.scale is None
            assert side.largest_value == pytest.approx(float((left - right).abs().max()), rel=1e-6)
        x = torch.cat([second[layer.name][0] for _, (second, _) in seen]).numpy()
        s_in = module.input_scale.numpy()
        q = oracle.quantize(x, s_in)
        assert layer.input.b.histogram == tuple(int((q == code).sum()) for code in range(-128, 128))
        steps = (x * (1 / s_in)).round()
        assert layer.input.b.clipped_low == pytest.approx((steps < -128).mean())
        assert layer.input.b.clipped_high == pytest.approx((steps > 127).mean())
        if module.output_scale is None:
            assert layer.output.b.histogram is None
            continue
        raw = oracle.linear(x, oracle.unpack_bits(module.packed, 8, x.shape[1]), module.weight_scale, s_in)
        y = oracle.linear(
            x, oracle.unpack_bits(module.packed, 8, x.shape[1]), module.weight_scale, s_in, module.output_scale
        )
        codes = (y / module.output_scale.numpy()).round()
        assert layer.output.b.histogram == tuple(int((codes == code).sum()) for code in range(-128, 128))
        assert (layer.output.b.low, layer.output.b.high) == (raw.min(), raw.max())
        limit = (raw / module.output_scale.numpy()).round()
        assert layer.output.b.clipped_low == (limit < -128).mean()
        assert layer.output.b.clipped_high == (limit > 127).mean()
    logits = [(first[1].double(), second[1].double()) for first, second in seen]
    kl, agreeing, losses = [], [], []
    for (la, lb), window in zip(logits, used, strict=True):
        pa, pb = torch.log_softmax(la[:-1], -1), torch.log_softmax(lb[:-1], -1)
        kl.append(float((pa.exp() * (pa - pb)).sum(-1).mean()))
        agreeing.append(float((pa.argmax(-1) == pb.argmax(-1)).double().mean()))
        losses.append(tuple(float(-p.gather(1, window[1:, None]).mean()) for p in (pa, pb)))
    # logits and their logarithms are float32: errors of some epsilons of the largest, here about 4
    tolerance = 64 * 4 * torch.finfo(torch.float32).eps
    assert result.kl == pytest.approx(sum(kl) / 3, abs=tolerance)
    assert result.kl_standard_error == pytest.approx(standard_error(kl), abs=tolerance)
    assert result.top1_agreement == pytest.approx(sum(agreeing) / 3)
    assert result.perplexity.reference.window_nll == pytest.approx([first for first, _ in losses], abs=tolerance)
    assert result.perplexity.quantized.window_nll == pytest.approx([second for _, second in losses], abs=tolerance)
    assert result.tokens == 3 * 19


def test_alone_is_the_layers_own_noise(folders: tuple[Path, Path]) -> None:
    a, b = Subject.parse(str(folders[0])).load(torch.float32), load_model(folders[1])
    (window,) = some_windows(1)
    result = compare_models(a, b, [window])
    kept, _ = outputs_of(a, window)
    for layer in result.layers:
        x, y = kept[layer.name]
        with torch.inference_mode():
            other = b.get_submodule(layer.name)(x)
        expected = 10 * math.log10(float(y.double().square().sum()) / float((y - other).double().square().sum()))
        assert layer.alone == pytest.approx(expected, abs=2e-6)


def test_equal_models_are_equal(folders: tuple[Path, Path]) -> None:
    model = load_model(folders[1])
    result = compare_models(model, load_model(folders[1]), some_windows())
    assert result.first_difference is result.first_below is None
    assert (result.kl, result.top1_agreement, result.perplexity.nll_increase) == (0, 1, 0)
    for layer in result.layers:
        assert layer.alone is layer.input.sqnr is layer.output.sqnr is None
        assert layer.input.differing == layer.output.differing == 0
        assert layer.input.largest_code == 0
    assert json.loads(json.dumps(comparison_json(Subject("a", "integer"), Subject("b", "integer"), result)))


def test_integer_and_emulated_part_where_trace_says() -> None:
    ids = [torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(0))]
    integer, emulated, theirs = (Subject.parse(f"{GEMMA}@{n}") for n in ("integer", "emulated", "transformers"))
    result = compare_models(integer.load(torch.bfloat16), emulated.load(torch.bfloat16), ids)
    assert result.first_difference == ("model.layers.0.self_attn.q_proj", "output")
    torchs = [subject.load(torch.bfloat16, native=False) for subject in (emulated, theirs)]
    same = compare_models(*torchs, ids)
    assert same.first_difference is None
    assert {layer.scheme_a: layer.scheme_b for layer in same.layers}.items() >= {"w4a8o8": "w4a8o8"}.items()
    assert all(layer.scheme_a == layer.scheme_b for layer in same.layers)


class _Branches(nn.Module):
    """Two layers, called in one order or the other, the second of which writes to its input in place."""

    device = torch.device("cpu")

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.swapped = swapped

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        x = nn.functional.one_hot(input_ids, 4).float()
        order = (self.second, self.first) if self.swapped else (self.first, self.second)
        logits = x * 0
        for layer in order:
            y = layer(x)
            logits = logits + y
            y.zero_()
        return type("Output", (), {"logits": logits})


def test_layers_called_in_another_order_still_meet() -> None:
    met: list[str] = []
    equal: list[bool] = []

    def meet(name: str, a: object, b: object) -> None:
        met.append(name)
        equal.append(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and bool(a.y.any()))

    with Lockstep(_Branches(False), _Branches(True), ["first", "second"], meet) as both:
        for _ in range(3):
            first, second = both.run(torch.tensor([0, 1, 2]))
            assert torch.equal(first, second)
    assert sorted(met) == ["first"] * 3 + ["second"] * 3
    assert all(equal)
    assert not [t for t in threading.enumerate() if t.name.startswith("bytelane-lockstep")]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_model_that_fails_ends_the_other(failing: int) -> None:
    models = [_Branches(False), _Branches(False)]
    models[failing].second = nn.Linear(5, 4)
    with (
        pytest.raises(RuntimeError, match=r"shape|size"),
        Lockstep(models[0], models[1], ["first", "second"], lambda *_: None) as both,
    ):
        both.run(torch.tensor([0, 1, 2]))
    assert not [t for t in threading.enumerate() if t.name.startswith("bytelane-lockstep")]


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    sums = SideSums(None, torch.tensor(0.5))
    a, b = torch.tensor([1.0, math.nan, 3.0, math.inf]), torch.tensor([1.0, 2.0, 2.5, 1.0])
    sums.add(a, b, a, b)
    found = sums.result()
    assert found.non_finite == 2
    assert found.sqnr == pytest.approx(10 * math.log10(10 / 0.25))
    assert (found.a.low, found.a.high) == (1, 3)
    assert found.differing == 3 / 4


def test_sensitivity_replaces_one_layer(folders: tuple[Path, Path]) -> None:
    a, b = Subject.parse(str(folders[0])).load(torch.float32), load_model(folders[1])
    (window,) = some_windows(1)
    name = "model.layers.0.mlp.up_proj"
    found = sensitivity(a, b, window, [name])
    _, before = outputs_of(a, window)
    a.set_submodule(name, b.get_submodule(name))
    _, after = outputs_of(a, window)
    pa, pb = torch.log_softmax(before.double(), -1), torch.log_softmax(after.double(), -1)
    assert found[name] == pytest.approx(float((pa.exp() * (pa - pb)).sum(-1).mean()), abs=1e-5)


def test_findings_name_what_is_wrong(folders: tuple[Path, Path]) -> None:
    a, b = Subject.parse(str(folders[0])).load(torch.float32), load_model(folders[1])
    layer = b.get_submodule("model.layers.1.self_attn.o_proj")
    layer.output_scale.fill_(1e-4)
    b.get_submodule("model.layers.0.self_attn.q_proj").output_scale.fill_(100.0)
    said = findings(compare_models(a, b, some_windows()))
    assert any("clip more than 1%" in s and "output of model.layers.1.self_attn.o_proj" in s for s in said)
    assert any("less than 10% of their range" in s and "output of model.layers.0.self_attn.q_proj" in s for s in said)
    assert any("under 10 dB" in s for s in said)


def test_models_that_do_not_fit_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny.float_model(tiny.config("llama", vocab_size=300, intermediate_size=128))
    with pytest.raises(errors.ConfigError, match="differ in shape"):
        compare_models(other, load_model(folders[1]), some_windows())
    with pytest.raises(errors.ConfigError, match="no linear layer in common"):
        compare_models(nn.Linear(1, 1), load_model(folders[1]), some_windows())
    with pytest.raises(ValueError, match="at least 2 token ids"):
        compare_models(other, other, [])
    for text, rule in ((f"{folders[0]}@integer", "need a quantized"), (f"{folders[1]}@integer,batch=2", "belong to")):
        with pytest.raises(errors.ConfigError, match=rule):
            Subject.parse(text)


def test_the_command(capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--window", "64", "--max-tokens", "256", "--sensitivity", "--dtype", "float32")
    file = tmp_path / "comparison.json"
    found = call_json(capsys, "compare", *folders, *options, "-o", file)
    assert json.loads(file.read_text()) == found
    assert (found["a"]["runtime"], found["b"]["runtime"]) == ("float", "integer")
    assert found["tokens"] == 4 * 63
    assert all(layer["sensitivity"] > 0 for layer in found["layers"])
    code, out, _ = call(capsys, "compare", *folders, *options)
    assert code == 0
    assert "perplexity" in out
    assert "lose most" in out
    code, out, _ = call(capsys, "compare", folders[1], folders[1], *options[:4], "--all")
    assert code == 0
    assert "15 of 15 are equal" in out
    code, _, err = call(capsys, "compare", tmp_path, folders[1])
    assert code == 2
    assert "Error" in err


def test_the_sample_text_is_long_enough() -> None:
    assert len(sample_text().split()) > 600
