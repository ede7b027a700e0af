"""The script that writes the README's figures: what it writes, and where; nothing is measured."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "readme", raising=False)
    import readme

    return readme


RESULT = {
    "in_features": 64,
    "out_features": 32,
    "rows": 1,
    "bits": 4,
    "seconds": 2e-5,
    "of_limit": 0.755,
    "bound": "read",
    "ratios": {"bfloat16": 3.25, "vllm": 2.0},
}
FOUND = {
    "commit": "abc1234",
    "linear": [
        {
            "machine": "A CPU (family 1, model 2)",
            "threads": 2,
            "versions": {"bytelane": "0.1.0", "torch": "2.13.0"},
            "date": "2026-01-02",
            "limits": {"isa": "avx2", "threads": 2, "bandwidth": 30e9, "dot_rate": {"4": 200e9}},
            "results": [RESULT, {**RESULT, "bits": 8, "ratios": {"bfloat16": 1.0}}],
        }
    ],
}


def test_the_table_has_a_column_for_each_peer_that_ran_and_gaps_where_it_did_not(script: Any) -> None:
    lines = script.linear_table(FOUND["linear"]).splitlines()
    assert lines[0] == "| in x out | M | bits | us | % of limit | bfloat16 | vLLM int4 |"
    assert lines[2:] == [
        "| 64 x 32 | 1 | 4 | 20 | 76 (read) | 3.2 | 2.0 |",
        "| 64 x 32 | 1 | 8 | 20 | 76 (read) | 1.0 |  |",
    ]


def test_the_figures_name_machine_releases_date_and_commit(script: Any) -> None:
    text = script.figures(FOUND)
    for part in ("A CPU (family 1, model 2)", "avx2", "torch 2.13.0", "2026-01-02", "abc1234", "30 to 30 GB/s"):
        assert part in text
    assert "llama" not in text
    more = copy.deepcopy(FOUND)
    rates = {"bytes": 1e6, "prefill_tokens_per_second": 99.6, "decode_tokens_per_second": 12.34}
    more["llama"] = {
        "llama_cpp_python": "0.3",
        "threads": 2,
        "prompt": 8,
        "date": "2026-01-02",
        "results": {"bytelane": rates, "llama.cpp": rates},
        "ratios": {"prefill": 1.0, "decode": 1.0},
    }
    assert "| bytelane | 1.0 MB | 100 | 12.3 |" in script.figures(more)


def test_only_what_stands_between_the_markers_is_replaced(script: Any) -> None:
    begin, end = "<!-- x: written by benchmarks/readme.py -->", "<!-- end of x -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert script.replace(text, "x", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert script.replace(script.replace(text, "x", "new"), "x", "old") == text
    for broken in ("nothing", begin, f"{end} {begin}", text + text):
        with pytest.raises(ValueError, match="once each"):
            script.replace(broken, "x", "new")


def test_the_readme_says_what_the_results_say(script: Any) -> None:
    import json

    found = json.loads(script.RESULTS.read_text())
    text = script.README.read_text()
    assert script.replace(text, "figures of the CPU", script.figures(found)) == text


def test_the_gpu_tables_are_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "gpu_table", raising=False)
    import gpu_table

    text = (SCRIPTS.parent / "README.md").read_text()
    for name, table in (("linear", gpu_table.alone), ("peers", gpu_table.beside_peers)):
        measured = json.loads((SCRIPTS / "results" / f"gpu_{name}_h100.json").read_text())
        assert table(measured, {1, 16, 256, 4096}) in text
        assert "4096 x 14336" in table(measured, {1})
        assert "| 16 |" not in table(measured, {1})


def test_the_tuning_guide_says_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "tune_report", raising=False)
    import tune_report

    measured = json.loads(tune_report.RESULTS.read_text())
    text = tune_report.GUIDE.read_text()
    assert tune_report.replace(text, tune_report.table(measured)) == text
    assert (SCRIPTS.parent / "docs" / "images" / "tuning.svg").read_text() == tune_report.svg(measured)
    with pytest.raises(SystemExit, match="no <!--"):
        tune_report.replace("a guide without marks", "")
    steps = json.loads((SCRIPTS / "results" / "tune_step_h200.json").read_text())["steps"]
    for line in steps:
        cells = (
            f"{line['batch']} windows",
            f"{line['seconds'] * 1e3:.0f} ms",
            f"{line['tokens_per_second'] / 1e3:.0f} thousand",
            str(line["kernels"]),
            f"{line['peak_bytes'] / 1e9:.0f} GB",
            f"{line['start_seconds']:.0f} s",
        )
        assert f"| {' | '.join(cells)}" in text
