"""Kernels are known before they are needed, and compiled by processes of their own into Triton's cache on disk.

No GPU is needed: a driver that names one stands in, as in test_triton_launch.py, and the code is really compiled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton import knobs
from triton.runtime import driver

import bytelane
import tiny
from bytelane import layers, ops
from bytelane.kernels import compile_ahead as ahead
from bytelane.kernels import cuda, triton_launch
from bytelane.kernels.compile_worker import NamedDevice
from bytelane.kernels.triton_configs import CodesTile, DecodeTile
from bytelane.kernels.triton_launch import Launch, noting

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="stands in for a GPU, and for compiled code",
)


class Chosen:
    """As much of a row of the table of kernels as a layer asks for."""

    bind = None

    def __init__(self, op: str) -> None:
        self.run = getattr(cuda, op)


def by_cuda_kernels(op: str, *problem: Any) -> Chosen:
    return Chosen(op)


def linear(m: int, tile: Any, n: int = 128) -> None:
    scale = torch.tensor(0.1)
    rows = torch.zeros(n, 256, dtype=torch.uint8)
    cuda.linear(torch.randn(m, 512).bfloat16(), rows, torch.ones(n, 1), scale, scale, None, 4, tile=tile)


def test_what_is_noted_is_not_launched() -> None:
    with noting() as found:
        linear(2, DecodeTile(4, 64, 2))
        linear(20, CodesTile(64, 32, 64, 8, 4, 3))
    assert [launch.kernel.__name__ for launch, _ in found] == ["decode_linear", "quantize_planes", "codes_linear"]
    assert found[0][1][:2] == (torch.bfloat16, torch.uint8)
    with noting() as inner:
        pass
    assert inner == []


def test_numbers_of_rows_that_triton_compiles_alike_are_one_job() -> None:
    tile = CodesTile(64, 32, 64, 8, 4, 3)
    with noting() as found:
        for m in (20, 21, 27):
            linear(m, tile)
        linear(20, tile, n=130)  # no multiple of 16, so other code
    names = [job.name for job, _ in ahead.distinct_jobs(found)]
    assert names.count("codes_linear") == 2
    assert names.count("quantize_planes") == 1


def test_a_models_kernels_are_known_from_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its tables, its cache and its linear layers, and none for a number of rows it is not asked about."""
    config = tiny.config("llama")
    tiny.write_random(tmp_path / "model", config, tiny.default_schemes(config))
    model = bytelane.load_model(tmp_path / "model", dtype=torch.bfloat16, float_ops="torch", kv_cache="float")
    for module in (layers, ops):
        monkeypatch.setattr(module, "select", by_cuda_kernels)
    one = {job.name for job, _ in ahead.distinct_jobs(ahead.recorded(model, [1]))}
    assert {"gather_rows", "codes_linear"} <= one
    every, standing = (
        {job.key(kernel) for job, kernel in ahead.distinct_jobs(ahead.recorded(model, rows))}
        for rows in (range(1, 1025), ahead.ROWS)
    )
    assert standing == every
    assert len(one) < len(every) <= 100


def test_processes_fill_the_cache_and_a_second_start_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert Path(knobs.cache.dir) == tmp_path
    with noting() as found:
        cuda.quantize(torch.randn(100).bfloat16(), torch.tensor(0.1))
        cuda.embedding(
            torch.tensor([1]), torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1), 4, 64, 1.0, torch.bfloat16
        )
    jobs = ahead.distinct_jobs(found)
    told: list[tuple[int, int]] = []
    report = ahead.compile_jobs(jobs, 90, workers=1, progress=lambda done, total: told.append((done, total)))
    assert (report.kernels, report.compiled, report.workers) == (2, 2, 1)
    assert told == [(1, 2), (2, 2)]
    code = sorted(tmp_path.rglob("*.cubin"))
    assert len(code) == 2
    monkeypatch.setattr(driver, "_active", NamedDevice(90))
    for launch, dtypes in found:  # this process finds what the other wrote
        triton_launch._compiled.__wrapped__(launch, 0, dtypes)
    assert sorted(tmp_path.rglob("*.cubin")) == code
    assert ahead.compile_jobs(jobs, 90).compiled == 0
    assert ahead._note(jobs, 90) != ahead._note(jobs, 80)


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with noting() as found:
        cuda.quantize(torch.randn(100).bfloat16(), torch.tensor(0.1))
    launch, dtypes = found[0]
    broken = Launch(launch.kernel, launch.grid, launch.numbers, {**launch.constants, "BLOCKS": 3})
    with pytest.raises(RuntimeError, match="quantize_planes does not compile for capability 90"):
        ahead.compile_jobs(ahead.distinct_jobs([(broken, dtypes)]), 90, workers=1)
    assert not list(tmp_path.glob("*.compiled"))


def test_other_devices_are_refused() -> None:
    model = tiny.float_model(tiny.config("llama"))
    with pytest.raises(ValueError, match="the model is on cpu"):
        ahead.compile_ahead(model)
