"""Widths by budget: what a plan promises the checkpoint keeps, and a plan that was edited wrongly says where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bytelane.models import open_model
from bytelane.quantize import (
    BitPlan,
    Budget,
    BudgetError,
    PlanError,
    Recipe,
    SensitivityError,
    make_plan,
    parse_size,
    plan_bits,
    quantize_model,
)
from bytelane.quantize.fold import rotate
from calibration import make_model

OPTIONS: dict[str, Any] = {"window": 24, "max_windows": 4}


@pytest.fixture(scope="module")
def planned(tokenizer: Any, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> BitPlan:
    return plan_bits(
        make_model(),
        tokenizer,
        documents,
        Recipe.of({"embeddings": 8}),
        Budget(average_bits=4.5),
        **OPTIONS,
    )


@pytest.fixture
def plan_file(planned: BitPlan, tmp_path: Path) -> Path:
    planned.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_plan_comes_back_as_it_was(planned: BitPlan, plan_file: Path) -> None:
    found = BitPlan.load(plan_file)
    assert [(x.name, x.bits, x.together, x.tied) for x in found.layers] == [
        (x.name, x.bits, x.together, x.tied) for x in planned.layers
    ]
    assert found.bytes == planned.bytes
    assert found.loss == planned.loss
    assert found.average_bits <= 4.5
    lines = plan_file.read_text().splitlines()
    assert sum('"name"' in line for line in lines) == len(planned.layers)  # a layer a line, for people and for diff
    assert not list(plan_file.parent.glob(".*partial"))


def test_layers_that_read_one_tensor_have_one_width(planned: BitPlan) -> None:
    by_name = {x.name: x for x in planned.layers}
    assert planned.layers[0].name == "model.embed_tokens"
    assert by_name["model.embed_tokens"].tied == "lm_head"
    assert "lm_head" not in by_name
    for i in range(2):
        q, k, v = (by_name[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv")
        assert q.bits == k.bits == v.bits
        assert k.together == v.together == q.name
    assert {x.bits for x in planned.layers} <= {2, 3, 4, 5, 6, 8}
    assert len({x.bits for x in planned.layers}) > 1


@pytest.mark.parametrize("storage", ["compressed-tensors", "gemma"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("kv_cache", [False, True])
def test_a_size_is_kept(
    storage: str, rounding: str, kv_cache: bool, tokenizer: Any, documents: list[str], tmp_path: Path
) -> None:
    model = make_model(bias=True)
    recipe = Recipe.of(
        {
            "embeddings": 8,
            "storage": storage,
            "rounding": rounding,
            "no_output": ["layers.1.mlp.down"],
            "kv_cache": kv_cache,
        }
    )
    smallest = None
    for size in (60_000, 70_000, 90_000):
        plan = plan_bits(model, tokenizer, documents, recipe, Budget(size=size), cache=tmp_path / "c", **OPTIONS)
        report = quantize_model(
            model, tokenizer, documents, plan.to_recipe(), tmp_path / "out", overwrite=True, **OPTIONS
        )
        assert report.checkpoint_bytes <= plan.bytes <= size
        assert report.checkpoint_bytes > 0.93 * plan.bytes  # what is allowed for headers is not all used
        checkpoint, _ = open_model(tmp_path / "out")
        with checkpoint:
            got = {m.name: m.scheme.weight.num_bits for m in checkpoint.modules.values()}
            sides = {m.name: getattr(m.scheme, "quantize_output", False) for m in checkpoint.modules.values()}
        assert got == {x.name: x.bits for x in plan.layers}
        assert sides == {x.name: x.output for x in plan.layers}
        assert smallest is None or plan.loss < smallest
        smallest = plan.loss
    with pytest.raises(BudgetError, match="20000 bytes are too few: with 2 bits everywhere the checkpoint has"):
        plan_bits(model, tokenizer, documents, recipe, Budget(size=20_000), cache=tmp_path / "c", **OPTIONS)


def test_a_loss_is_kept_with_the_fewest_bytes(tokenizer: Any, documents: list[str], tmp_path: Path) -> None:
    model, cache = make_model(), tmp_path / "losses.json"

    def plan(**budget: float) -> BitPlan:
        return plan_bits(model, tokenizer, documents, Recipe(), Budget(**budget), cache=cache, **OPTIONS)

    rough = plan(average_bits=3)
    fine = plan(loss=0.5 * rough.loss)
    assert fine.loss <= 0.5 * rough.loss
    assert fine.bytes > rough.bytes
    again = plan(size=fine.bytes)
    assert again.loss <= fine.loss * (1 + 1e-9)
    with pytest.raises(BudgetError, match="even the best widths cost"):
        plan(loss=1e-30)


def test_what_is_measured_is_not_measured_again(tokenizer: Any, documents: list[str], tmp_path: Path) -> None:
    model, cache = make_model(), tmp_path / "losses.json"
    stages: list[str] = []

    def plan(budget: Budget, used: list[str]) -> BitPlan:
        return plan_bits(
            model, tokenizer, used, Recipe(), budget, cache=cache, progress=lambda s, d, n: stages.append(s), **OPTIONS
        )

    first = plan(Budget(average_bits=4), documents)
    assert stages.count("measure") == 4
    stages.clear()
    assert plan(Budget(average_bits=4), documents).layers == first.layers
    assert stages == []
    with pytest.raises(SensitivityError):
        plan(Budget(average_bits=4), documents[::-1])


def test_given_widths_stand(tokenizer: Any, documents: list[str]) -> None:
    recipe = Recipe.of({"embeddings": 4, "bits": {"embed|lm_head": 8, r"layers\.0\.self_attn\.q": 3}})
    plan = plan_bits(make_model(), tokenizer, documents, recipe, Budget(average_bits=5), widths=(4, 6), **OPTIONS)
    by_name = {x.name: x for x in plan.layers}
    assert by_name["model.embed_tokens"].bits == 8
    q, k, v = (by_name[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    assert q.bits == 3
    assert k.bits == v.bits
    assert q.losses == {}
    assert {x.bits for x in plan.layers if x.losses} <= {4, 6}
    assert plan.to_recipe() == plan.to_recipe(Recipe.of(plan.recipe))
    with pytest.raises(BudgetError, match="there is none to choose"):
        plan_bits(make_model(), tokenizer, documents, Recipe.of({"bits": {"": 4}}), Budget(average_bits=5), **OPTIONS)


def test_a_rotated_models_head_is_a_layer_of_its_own(tokenizer: Any, documents: list[str], tmp_path: Path) -> None:
    model = make_model()
    recipe = Recipe.of({"embeddings": 8, "rotate": True, "equalize": True})
    plan = plan_bits(model, tokenizer, documents, recipe, Budget(size=90_000), **OPTIONS)
    head = plan.layers[-1]
    assert (head.name, head.kind, head.input, head.output) == ("lm_head", "head", False, False)
    assert head.losses[2] > head.losses[8] > 0
    report = quantize_model(model, tokenizer, documents, plan.to_recipe(), tmp_path / "out", **OPTIONS)
    assert report.checkpoint_bytes <= 90_000
    plan.check_model(model)
    rotated = make_model()
    rotate(rotated)
    plan.check_model(rotated)


def test_a_layer_can_be_left_in_float_by_hand(plan_file: Path, tokenizer: Any, documents: list[str]) -> None:
    values = json.loads(plan_file.read_text())
    for layer in values["layers"]:
        if layer["name"].endswith("layers.1.mlp.down_proj") or layer["name"] == "model.embed_tokens":
            layer["bits"] = None
        if layer["name"].endswith("layers.0.mlp.down_proj"):
            layer.update(granularity=32, output=False)
    plan_file.write_text(json.dumps(values))
    plan = BitPlan.load(plan_file)
    plan.check_model(make_model())
    made = make_plan(make_model(), plan.to_recipe())
    by_name = {m.name: m for m in made.modules}
    assert made.float_tied
    assert set(made.unquantized) == {"model.embed_tokens", "lm_head", "model.layers.1.mlp.down_proj"}
    assert by_name["model.layers.0.mlp.down_proj"].scheme.label.endswith("a8o16")
    assert by_name["model.layers.0.mlp.down_proj"].scheme.weight.group_size == 32
    assert plan.by_bits["float"] == 2


Q, K = (f"model.layers.0.self_attn.{n}_proj" for n in "qk")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({K: {"bits": 9}}, f"{K}.bits: weights have 2 to 8 bits, found 9"),
        ({K: {"bits": "4"}}, f"{K}.bits: "),
        ({K: {"bitz": 4}}, f"{K}.bitz: no such entry"),
        ({K: {"granularity": 7}, Q: {"granularity": 7}}, "the group size 7 does not divide the 64 inputs"),
        ({K: {"bits": 7}}, f"{K}: 7 bits, channel, where {Q}, which reads the same tensor"),
        ({K: {"together": "x"}}, f'{K}: "together" names x, which is not in the plan'),
        ({K: {"name": Q}}, f"{Q}: there twice"),
        ({K: {"shape": [0, 64]}}, f"{K}: a shape has positive sizes"),
        ({"model.embed_tokens": {"input": True}}, "model.embed_tokens: a table has no sides"),
        ({"": {"layers": []}}, "no layer"),
        ({"": {"plan": 2}}, "no plan"),
        ({"": {"recipe": {"rang": 1}}}, "recipe: rang: no such setting"),
        ({"": {"recipe": {"storage": "gemma"}}}, "the gemma storage holds 2, 4 and 8 bits"),
    ],
)
def test_a_wrong_edit_is_named(changes: dict[str, dict[str, Any]], rule: str, plan_file: Path) -> None:
    values = json.loads(plan_file.read_text())
    values["layers"][1]["bits"] = values["layers"][2]["bits"] = values["layers"][3]["bits"] = 3
    for name, entries in changes.items():
        target = values if not name else next(x for x in values["layers"] if x["name"] == name)
        target.update(entries)
    plan_file.write_text(json.dumps(values))
    with pytest.raises((PlanError, ValueError), match=re.escape(rule)) as refused:
        BitPlan.load(plan_file)
    assert str(plan_file) in str(refused.value)


def test_a_plan_of_another_model_is_refused(planned: BitPlan, tmp_path: Path) -> None:
    other = make_model(tied=False)
    short = planned.model_copy(update={"layers": planned.layers[:-1]})
    with pytest.raises(PlanError, match=r"p: model\.layers\.1\.mlp\.down_proj: not in the plan"):
        short.check_model(make_model(), "p")
    wrong = planned.layers[0].model_copy(update={"shape": (64, 64)})
    with pytest.raises(PlanError, match=r"embed_tokens: the model's weight has the shape"):
        planned.model_copy(update={"layers": (wrong, *planned.layers[1:])}).check_model(make_model())
    extra = planned.layers[1].model_copy(update={"name": "model.layers.9.mlp"})
    with pytest.raises(PlanError, match=r"model\.layers\.9\.mlp: the model has no such linear"):
        planned.model_copy(update={"layers": (*planned.layers, extra)}).check_model(make_model())
    with pytest.raises(PlanError, match="lm_head: not in the plan"):
        planned.check_model(other)
    with pytest.raises(PlanError, match="no such file"):
        BitPlan.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "size"), [("60MB", 60_000_000), ("1.5 GiB", 3 << 29), ("2kB", 2000), ("77", 77), ("0.5mb", 500_000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "60 M", "-1MB", "1e3"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="a size is a number"):
        parse_size(text)


@pytest.mark.parametrize("values", [{}, {"size": 1, "loss": 1.0}, {"loss": 0.0}, {"average_bits": float("nan")}])
def test_a_budget_is_one_thing(values: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        Budget(**values)
