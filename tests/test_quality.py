"""The script that measures recipes: what it writes into the guide, and from what; nothing is measured."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bytelane.quantize import Recipe

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("quality", "readme"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import quality

    return quality


@pytest.mark.parametrize("place", [0, 1])
def test_the_guide_says_what_the_recipes_gave(quality: Any, place: int) -> None:
    file, marker = [*quality.MARKERS.items()][place]
    found = json.loads(file.read_text())
    text = quality.GUIDE.read_text()
    assert quality.replace(text, marker, quality.rows_table(found), script="benchmarks/quality.py") == text
    for row in found["rows"].values():
        made = quality.scored(row["window_nll"], found["float"]["window_nll"])
        assert made == {k: row[k] for k in made}
        assert len(row["window_nll"]) == found["score"]["windows"]


def test_a_row_has_the_recipe_it_is_called_after(quality: Any) -> None:
    for file in quality.MARKERS:
        for key, row in json.loads(file.read_text())["rows"].items():
            assert Recipe.of(row["recipe"]) == Recipe.of(quality.ROWS[key][1])


def test_the_guide_says_what_plans_gave(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    import plan

    found = json.loads(plan.RESULTS.read_text())
    text = plan.GUIDE.read_text()
    assert quality.replace(text, plan.MARKER, plan.rows_table(found), script="benchmarks/plan.py") == text
    assert plan.PICTURE.read_text() == plan.draw(found["rows"], found["float"]["perplexity"])
    for row in found["rows"].values():
        made = quality.scored(row["window_nll"], found["float"]["window_nll"])
        assert made["perplexity"] == pytest.approx(row["perplexity"])
        assert math.log(made["ratio"]) == pytest.approx(row["nll_increase"])


def test_a_recipe_is_scored_window_by_window(quality: Any) -> None:
    found = quality.scored([3.1, 2.3], [3.0, 2.0])
    assert found["perplexity"] == pytest.approx(math.exp(2.7))
    assert found["ratio"] == pytest.approx(math.exp(0.2))
    assert found["ratio_error"] == pytest.approx(found["ratio"] * 0.1)  # 0.1 and 0.3: deviation 0.1414, over sqrt 2


def test_rows_without_figures_are_left_out(quality: Any) -> None:
    row = {"perplexity": 22.0, "ratio": 1.1, "ratio_error": 0.01, "checkpoint_bytes": 1e6, "seconds": 90.0}
    found = {
        "model": "a-model",
        "text": "text.utf8",
        "score": {"windows": 4, "window": 32},
        "calibration_windows": 2,
        "machine": "A CPU",
        "date": "2026-01-02",
        "float": {"perplexity": 20.0, "bytes": 2e6},
        "rows": {"w4": {**row, "peak_bytes": 2e9}},
    }
    lines = quality.rows_table(found).splitlines()
    assert lines[0].startswith("a-model, 4 windows of 32 tokens of the evaluation documents of `text.utf8`")
    assert lines[4:] == [
        "| float | 20.00 | 1 | 2.0 MB | | |",
        f"| {quality.ROWS['w4'][0]} | 22.00 | 1.100 ± 0.010 | 1.0 MB | 1.5 min | 2.00 GB |",
    ]
