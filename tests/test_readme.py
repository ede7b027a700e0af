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


def test_the_summary_is_over_the_shapes_of_an_m_and_width(script: Any) -> None:
    other = {**RESULT, "in_features": 128, "of_limit": 0.5, "ratios": {"bfloat16": 13.0}}
    step = {**FOUND["linear"][0], "results": [RESULT, other, {**RESULT, "bits": 8, "ratios": {}}]}
    lines = script.summary([step]).splitlines()
    assert lines[0] == "| M | bits | % of limit | bfloat16 | vLLM int4 |"
    assert lines[2:] == ["| 1 | 4 | 50 to 76 | 6.5 (3.2) | 2.0 (2.0) |", "| 1 | 8 | 76 to 76 |  |  |"]


def test_of_several_machines_the_newest_comes_first(script: Any, tmp_path: Any) -> None:
    import json

    for isa, date in (("avx2", "2026-01-02"), ("avx512vnni", "2026-03-04")):
        step = {**FOUND["linear"][0], "date": date}
        (tmp_path / f"cpu_{isa}.json").write_text(json.dumps({**FOUND, "linear": [step]}))
    found = script.measured_files(tmp_path)
    assert [each["linear"][0]["date"] for each in found] == ["2026-03-04", "2026-01-02"]
    assert script.layers(found).count("| in x out |") == 2


def test_the_figures_name_machine_releases_date_and_commit(script: Any) -> None:
    text = script.figures([FOUND])
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
    assert "| bytelane | 1.0 MB | 100 | 12.3 |" in script.figures([more])


def test_only_what_stands_between_the_markers_is_replaced(script: Any) -> None:
    begin, end = "<!-- x: written by benchmarks/readme.py -->", "<!-- end of x -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert script.replace(text, "x", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert script.replace(script.replace(text, "x", "new"), "x", "old") == text
    for broken in ("nothing", begin, f"{end} {begin}", text + text):
        with pytest.raises(ValueError, match="once each"):
            script.replace(broken, "x", "new")


def test_the_readme_says_what_the_results_say(script: Any) -> None:
    found = script.measured_files()
    text = script.README.read_text()
    assert script.replace(text, "figures of the CPU", script.figures(found)) == text
    text = script.GUIDE.read_text()
    assert script.replace(text, "layers on the CPU", script.layers(found)) == text


@pytest.fixture
def gpu_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("gpu_table", "readme"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu_table

    return gpu_table


def test_the_readme_says_what_the_gpu_results_say(gpu_table: Any) -> None:
    text = gpu_table.README.read_text()
    assert gpu_table.replace(text, gpu_table.NAME, gpu_table.whole(), gpu_table.SCRIPT) == text


def test_the_tiles_that_ship_are_the_fastest_of_the_sweep(gpu_table: Any) -> None:
    """Within 3 %, the sweep's own spread."""
    from bytelane.kernels.triton_configs import linear_tile

    for r in gpu_table.load("tune")["results"]:
        times = {gpu_table.recorded_tile(tile): seconds for seconds, tile in r["best"]}
        tile = linear_tile("sm90", r["rows"], r["out"], r["in"], r["bits"], 0)
        assert times[tile] <= 1.03 * min(times.values()), (r["bits"], r["in"], r["out"], r["rows"])


def test_a_sweep_times_the_tiles_that_ship(gpu_table: Any) -> None:
    row = {"in": 4096, "out": 14336, "m": 1, "bits": 4, "seconds": {"bytelane": 9.0}, "limit_seconds": 1.0}
    tile = gpu_table.linear_tile("sm90", 1, 14336, 4096, 4, 0)
    record = {"kind": type(tile).__name__, **vars(tile)}
    sweep = {"in": 4096, "out": 14336, "rows": 1, "bits": 4, "best": [(2.0, {**record, "bn": 2}), (3.0, record)]}
    (found,) = gpu_table.tuned({"results": [row]}, {"results": [sweep]})["results"]
    assert found["seconds"] == {"bytelane": 3.0}
    assert found["tuned"]
    assert gpu_table.tuned({"results": [row]}, {"results": []})["results"] == [row]


def test_the_gpu_figures_are_the_tables(gpu_table: Any) -> None:
    results = [
        {"in": 64, "out": 32, "m": m, "bits": 4, "seconds": {"bytelane": 2e-6, "humming": s}, "limit_seconds": 1e-6}
        for m, s in ((1, 4e-6), (16, 9e-6))
    ]
    assert gpu_table.alone({"results": results}, {1}).splitlines()[-1] == "| 64 x 32 | 1 | 2.0, 50 % |"
    assert gpu_table.beside_peers({"results": results}).splitlines()[-1] == "| 64 x 32 | 4 | 3.00 (2.00 at M = 1) |"
    assert gpu_table.against_peers({"results": results}) == "humming 3.00 (2.00)"
    rates = {"prefill_tokens_per_second": 4000.0, "tokens_per_second": 99.96}
    row = {"candidate": "bytelane", "mode": "graph", "batch": 1, **rates, "weight_bytes": 2e6, "peak_bytes": 3e9}
    assert gpu_table.models({"results": [{"model": "m", **row}]}).endswith(
        "| bytelane | graph | 1 | 4000 | 100.0 | 2.0 MB | 3.00 GB |"
    )


def test_the_tuning_guide_says_what_the_results_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import json

    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "tune_report", raising=False)
    import tune_report

    measured = tune_report.merged(tune_report.RESULTS)
    text = tune_report.GUIDE.read_text()
    for name, files in tune_report.TABLES.items():
        assert tune_report.replace(text, tune_report.table(tune_report.merged(files)), name) == text
    assert (SCRIPTS.parent / "docs" / "images" / "tuning.svg").read_text() == tune_report.svg(measured)
    with pytest.raises(SystemExit, match="no <!--"):
        tune_report.replace("a guide without marks", "", "figures of tuning")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(tune_report.RESULTS[0].read_text()), "evaluated_tokens": 1}))
    with pytest.raises(SystemExit, match="scores 1 tokens, others 20440"):
        tune_report.merged([tune_report.RESULTS[0], other])
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
