"""The benchmark of whole models measures what it says, here on the CPU: a GPU's figures come from the same lines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bytelane

pytest.importorskip("triton", reason="Triton is not installed")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_generate

    return gpu_generate


SETTINGS = {"prompt": 4, "tokens": 3, "batch": "1,2", "rounds": 1}


def test_every_mode_and_batch_is_measured(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    arguments = argparse.Namespace(**SETTINGS, compile=False, profile=False)
    for name in ("bytelane", "bfloat16"):
        rows = list(bench.measure(name, GEMMA, arguments))
        assert [(r["mode"], r["batch"]) for r in rows] == [("eager", 1), ("graph", 1), ("eager", 2)]
        assert all(r["tokens_per_second"] > 0 and r["prefill_tokens_per_second"] > 0 for r in rows)
    assert bench.modes_of("transformers", 1, True) == ["eager"]


def test_eager_and_captured_steps_write_the_same_tokens(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is a generation: the tokens that the model is given are those it chose.

    With a float cache, which both read alike: on the CPU the growing int8 cache is read without a rounding to bfloat16.
    """
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    model = bytelane.load_model(GEMMA, kv_cache="float")
    seen: list[list[int]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].flatten().tolist()))
    prompt = torch.tensor([[5, 6, 7]])
    bench.eager_seconds(model, prompt, 4)
    eager, seen[:] = list(seen), []
    bench.graph_seconds(model, prompt, 4)
    assert eager == seen[:4]
    assert [len(ids) for ids in eager] == [3, 1, 1, 1]


@pytest.mark.parametrize("ending", ["sys.exit(3)", "time.sleep(60)"])
def test_what_a_candidate_measured_before_it_failed_counts(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    row = {"mode": "eager"}
    worker = tmp_path / "worker.py"
    worker.write_text(f"import sys, time\nprint({json.dumps(row)!r}, flush=True)\nprint('{{cut', end='')\n{ending}\n")
    monkeypatch.setattr(bench, "__file__", str(worker))
    assert bench.in_a_process("bytelane", GEMMA, [], 3.0) == [row]
    assert f"bytelane on {GEMMA} ended with" in capsys.readouterr().out


def test_the_readmes_table_is_made_of_its_rows(bench: Any) -> None:
    import gpu_table

    row = {
        "model": "llama1b",
        "candidate": "bytelane",
        "mode": "graph",
        "batch": 1,
        "prefill_tokens_per_second": 20000.0,
        "tokens_per_second": 51.25,
        "weight_bytes": 900_000_000,
        "peak_bytes": 1_500_000_000,
        "compile": {"kernels": 29, "compiled": 29, "workers": 16, "seconds": 12.2},
    }
    compiled = {**row, "mode": "compiled", "prefill_tokens_per_second": None}
    text = gpu_table.models({"results": [row, compiled]})
    assert "| llama1b | bytelane | graph | 1 | 20000 | 51.2 | 900.0 MB | 1.50 GB |" in text
    assert "| llama1b | bytelane | compiled | 1 |  | 51.2 |" in text
    assert gpu_table.compiling({"results": [row, compiled]}) == "llama1b: 29 kernels by 16 processes in 12 s"
