"""`quantize` on the command line: scales that are learned, and where it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bytelane.models import load_model
from test_cli import call, call_json, float_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model and a text."""
    return float_folder(tmp_path_factory.mktemp("quantize"))


def command(folder: Path, out: Path) -> list[str | Path]:
    return ["quantize", folder / "float", out, "--text", folder / "text.txt", "--windows", "3", "--window", "32"]


def test_scales_are_learned_in_so_many_steps(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    made = call_json(capsys, *command(folder, tmp_path / "out"), "--learn-scales", "2", "--range", "99.9")
    assert made["recipe"]["learn_scales"] == 2
    assert made["ranges"] == {"learned": 28}
    plain = call_json(capsys, *command(folder, tmp_path / "plain"), "--range", "99.9", "--learn-scales", "0")
    assert plain["ranges"] == {"percentile 99.9": 28}
    layers = zip(made["layers"], plain["layers"], strict=True)
    ratios = [a["output_scale"] / b["output_scale"] for a, b in layers if a["output_scale"] is not None]
    assert all(0.95 < r < 1.05 and r != 1 for r in ratios)  # two steps of at most two percent
    with torch.no_grad():
        assert load_model(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    code, out, _ = call(capsys, *command(folder, tmp_path / "again"), "--learn-scales", "1")
    assert code == 0
    assert "learned on 28 sides" in out


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (("--learn-scales", "-1"), "--learn-scales"),
        (("--learn-scales", "many"), "--learn-scales"),
        (("--device", "gpu9"), "torch knows no device called gpu9"),
        (("--device", "cuda:64"), "CUDA devices here"),
    ],
)
def test_what_is_misused_is_refused(capsys, folder: Path, tmp_path: Path, given: tuple[str, str], rule: str) -> None:
    code, _, err = call(capsys, *command(folder, tmp_path / "out"), *given)
    assert code == 2
    assert rule in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_steps_that_are_none_is_refused(capsys, folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"learn_scales": 1.5}', encoding="utf-8")
    code, _, err = call(capsys, *command(folder, tmp_path / "out"), "--recipe", recipe)
    assert code == 2
    assert "recipe.json: learn_scales: Input should be a valid integer" in " ".join(err.split())
