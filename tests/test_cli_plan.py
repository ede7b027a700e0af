"""Plans on the command line: made, shown, edited, used, and held against what came of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from test_cli import call, call_json, float_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model and a text."""
    return float_folder(tmp_path_factory.mktemp("plans"))


def options(folder: Path) -> list[str | Path]:
    return ["--text", folder / "text.txt", "--windows", "3", "--window", "32"]


def test_a_plan_is_made_edited_used_and_checked(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    plan, losses = tmp_path / "plan.json", tmp_path / "losses.json"
    made = ("quantize", folder / "float", *options(folder), "--embeddings", "4", "--write-plan", plan)
    found = call_json(capsys, *made, "--size-budget", "0.15MB", "--losses", losses)
    assert found["plan"]["totals"]["bytes"] <= 150_000
    assert "layers" not in found  # no checkpoint was made
    assert json.loads(losses.read_text())["windows"] == 3
    shown = call_json(capsys, "inspect", plan)
    assert shown["totals"] == found["plan"]["totals"]
    code, out, _ = call(capsys, "inspect", plan)
    assert code == 0
    assert "nats a token more than in float" in out

    values = json.loads(plan.read_text())
    layer = next(x for x in values["layers"] if x["name"] == "model.layers.1.mlp.down_proj")
    layer.update(bits=5, output=False)
    plan.write_text(json.dumps(values))
    done = call_json(capsys, "quantize", folder / "float", tmp_path / "out", *options(folder), "--plan", plan)
    labels = {r["name"]: r["label"] for r in done["layers"]}
    assert labels["model.layers.1.mlp.down_proj"] == "w5a8o16"
    assert call_json(capsys, "inspect", tmp_path / "out", "--plan", plan)["not_as_planned"] == []
    layer.update(bits=6)
    plan.write_text(json.dumps(values))
    code, out, _ = call(capsys, "inspect", tmp_path / "out", "--plan", plan)
    assert code == 0
    assert "model.layers.1.mlp.down_proj: 5 bits, channel, input int8, output float" in " ".join(out.split())


def test_a_budget_and_the_checkpoint_in_one_go(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    code, out, err = call(
        capsys, "quantize", folder / "float", tmp_path / "out", *options(folder), "--average-bits", "3.5",
        "--widths", "2,4,8", "--storage", "gemma", "--write-plan", plan,
    )  # fmt: skip
    assert code == 0, err
    assert "on average" in out
    assert call_json(capsys, "inspect", tmp_path / "out", "--plan", plan)["not_as_planned"] == []


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (("--plan", "PLAN", "--size-budget", "1MB"), "give a budget or a plan"),
        (("--plan", "PLAN", "--default-bits", "4"), "decides every layer"),
        (("--write-plan", "x.json"), "go with --size-budget"),
        (("--average-bits", "4", "--widths", "2;4"), "numbers with commas"),
        (("--average-bits", "4", "--loss-budget", "1"), "one of them only"),
        (("--average-bits", "4", "--widths", "9"), "holds 2, 3, 4, 5, 6, 7, 8"),
        (("--size-budget", "tiny"), "a size is a number"),
        (("--plan", "float/config.json"), "no plan"),
    ],
)
def test_what_does_not_go_together_is_said(
    given: tuple[str, ...], rule: str, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    layer = {"name": "x", "kind": "linear", "shape": [4, 4], "bits": 4}
    (tmp_path / "plan.json").write_text(json.dumps({"plan": 1, "model": "X", "layers": [layer]}))
    arguments = [str(tmp_path / "plan.json") if a == "PLAN" else a for a in given]
    code, _, err = call(capsys, "quantize", "float", tmp_path / "out", *options(folder), *arguments)
    assert code == 2
    assert rule in " ".join(err.replace("\u2502", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_model_says_so(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    layer = {"name": "model.layers.9.mlp.up_proj", "kind": "linear", "shape": [4, 4], "bits": 4}
    plan.write_text(json.dumps({"plan": 1, "model": "X", "layers": [layer]}))
    for command in ("quantize", "tune"):
        code, _, err = call(
            capsys, command, folder / "float", tmp_path / "out", "--text", folder / "text.txt", "--split", "all",
            "--window", "32", "--plan", plan,
        )  # fmt: skip
        assert code == 2, command
        assert "model.layers.9.mlp.up_proj: the model has no such linear layer" in err
    code, _, err = call(capsys, "quantize", folder / "float", "--text", folder / "text.txt")
    assert code == 2
    assert "only --write-plan does without" in " ".join(err.replace("\u2502", " ").split())
