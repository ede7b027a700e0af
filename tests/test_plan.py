"""`report.plan` against the drivers it describes, and against bytes counted by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bytelane.dispatch import Kernel, Problem, explain
from bytelane.kernels import cpu
from bytelane.report import plan

CSRC = Path(__file__).parent.parent / "csrc" / "cpu"


def _kernel(isa: str, bits: int, m: int) -> Kernel:
    """The kernel of the table that has packed rows of these bits, as it would be on another processor."""
    return replace(explain(Problem("linear", "cpu", torch.bfloat16, bits, 0, m)).kernel, isa=isa)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("matmul.hpp", "kPanelRows", plan.PANEL_ROWS),
        ("matmul.hpp", "kMaxTile", plan.MAX_TILE),
        ("matmul_quads.hpp", "kSerialBytes", plan.SERIAL_BYTES),
        ("matmul.hpp", "kTileBytes", plan.TILE_BYTES),
        ("requantize.hpp", "kStep", plan.STEP),
        ("convert.hpp", "kChunk", plan.PANEL),
    ],
)
def test_the_constants_are_those_of_the_drivers(file: str, name: str, value: int) -> None:
    found = re.search(rf"constexpr \S+ {name} = (\d+)(?: << (\d+))?;", (CSRC / file).read_text())
    assert found is not None, f"{file} has no {name}: describe the new blocking in report/plan.py"
    assert int(found[1]) << int(found[2] or 0) == value


@pytest.mark.parametrize("isa", ["avx512vbmi", "avx512vnni", "avxvnni", "avx2", "dotprod", "portable"])
def test_the_rows_of_an_instruction_set_are_those_of_its_source(isa: str) -> None:
    source = (CSRC / f"isa_{isa.replace('vbmi', 'vnni')}.cpp").read_text()  # VBMI is the same source with a macro
    tables = (
        ("quad_channels", plan.QUAD_CHANNELS, 4),
        ("quad_rows", plan.QUAD_ROWS, 2),
        ("most_quad_rows", plan.MOST_QUAD_ROWS, 0),
    )
    if isa in plan.MOST_SPREAD_ROWS:
        tables += (("most_spread_rows", plan.MOST_SPREAD_ROWS, 0),)
    if isa == "avx2":
        tables += (("few_rows", plan.FEW_ROWS, 0), ("few_channels", plan.FEW_CHANNELS, 0))
    else:
        assert "few_rows" not in source
    if isa in ("avx2", "avxvnni"):  # the second is the first's source, so it has to say that it does otherwise
        tables += (("group_panel_rows", plan.GROUP_PANEL_ROWS, 0),)
    else:
        assert "group_panel_rows" not in source
    for name, table, other in tables:
        (found,) = re.findall(rf"static constexpr int {name} = (\d+);", source)
        assert int(found) == table.get(isa, other)


def test_up_to_so_many_rows_tile_registers_are_left_alone() -> None:
    (found,) = re.findall(r"kMostOtherRows = (\d+);", (CSRC / "isa_avx512amx.cpp").read_text())
    assert plan.MOST_QUAD_ROWS["avx512amx"] == plan.MOST_SPREAD_ROWS["avx512amx"] == int(found)


@pytest.mark.parametrize(
    ("k", "n", "m", "bits", "threads", "blocking", "split"),
    [
        (1536, 6144, 1, 4, 2, "64 channels x 1 row a tile", 2),
        (1536, 6144, 7, 4, 2, "4 channels x 4 rows a tile", 2),
        (1536, 6144, 16, 4, 2, "4 channels x 6 rows a tile", 2),
        (1536, 6144, 20, 8, 2, "4 channels x 5 rows a tile", 2),
        (1536, 6144, 21, 8, 2, "panels of 64 channels", 2),
        (64, 64, 2, 4, 2, "4 channels x 2 rows a tile", 1),
        (1536, 16, 8, 4, 2, "4 channels x 4 rows a tile", 1),
        (1536, 256, 1, 4, 2, "32 channels x 1 row a tile", 2),
        (64, 64, 1, 4, 2, "64 channels x 1 row a tile", 1),
        (1536, 64, 512, 4, 2, "panels of 64 channels", 1),
    ],
)
def test_plans(k: int, n: int, m: int, bits: int, threads: int, blocking: str, split: int) -> None:
    kernel = _kernel("avx512vbmi", bits, m)
    made = plan.plan_linear(kernel, k, n, m, bits, threads)
    assert made.blocking.startswith(blocking)
    assert made.threads == split


@pytest.mark.parametrize(
    ("m", "bits", "blocking"),
    [
        (1, 4, "64 channels x 1 row a tile"),
        (7, 4, "4 channels x 2 rows a tile"),
        (8, 4, "panels of 64 channels"),
        (11, 8, "4 channels x 2 rows a tile"),
        (12, 8, "panels of 64 channels"),
    ],
)
def test_plans_without_tall_tiles(m: int, bits: int, blocking: str) -> None:
    assert plan.plan_linear(_kernel("portable", bits, m), 1536, 6144, m, bits, 2).blocking.startswith(blocking)


@pytest.mark.parametrize(
    ("m", "blocking"),
    [
        (2, "4 channels x 2 rows"),
        (3, "2 channels x 3 rows"),
        (5, "2 channels x 5 rows"),
        (48, "2 channels x 6 rows"),
        (49, "panels"),
    ],
)
def test_plans_of_two_channels(m: int, blocking: str) -> None:
    assert plan.plan_linear(_kernel("avx2", 4, m), 1536, 6144, m, 4, 2).blocking.startswith(blocking)


@pytest.mark.parametrize(
    ("isa", "m", "blocking"),
    [
        ("avx2", 1, "64 channels x 1 row a tile, codes spread in registers"),
        ("avx2", 8, "2 channels x 4 rows a tile, codes spread in registers"),
        ("avx2", 9, "panels of 64 channels"),
        ("avx512amx", 12, "4 channels x 6 rows a tile, codes spread in registers"),
        ("avx512amx", 13, "panels of 64 channels, spread to bytes and transposed once for all rows, multi"),
        ("avx512vbmi", 64, "4 channels x 6 rows a tile, codes spread in registers"),
        ("portable", 2, "64 channels x 2 rows a tile, codes spread to bytes on the way"),
    ],
)
def test_plans_of_other_widths(isa: str, m: int, blocking: str) -> None:
    assert plan.plan_linear(_kernel(isa, 3, m), 1536, 6144, m, 3, 2).blocking.startswith(blocking)


@pytest.mark.parametrize(
    ("isa", "m", "blocking"),
    [
        ("avx512vnni", 1, "64 channels, four of them x 1 row a tile, codes dotted as they lie, 48 groups"),
        ("avx512vnni", 3, "64 channels, four of them x 3 rows a tile, codes dotted as they lie, 48 groups"),
        ("avx512vnni", 8, "panels of 64 channels"),
        ("avx512amx", 17, "panels of 64 channels, spread to bytes and transposed once for all rows"),
        ("avx2", 1, "64 channels, four of them x 1 row a tile, codes dotted as they lie, 48 groups"),
        ("avx2", 4, "64 channels, four of them x 4 rows a tile, codes dotted as they lie, 48 groups"),
        ("avx2", 5, "panels of 64 channels"),
        ("avxvnni", 7, "32 channels, four of them x 4 rows a tile, codes dotted as they lie, 48 groups"),
    ],
)
def test_plans_of_groups(isa: str, m: int, blocking: str) -> None:
    kernel = replace(explain(Problem("linear", "cpu", torch.bfloat16, 4, 32, m)).kernel, isa=isa)
    assert plan.plan_linear(kernel, 1536, 6144, m, 4, 2, 32).blocking.startswith(blocking)


def test_what_a_token_reads_of_groups_is_what_the_kernel_reads() -> None:
    """Codes, and the kept scales instead of the weight scales: as many bytes, where channels come in fours."""
    scale = torch.full((12, 3), 0.1)
    kept = cpu.group_scales(scale, torch.tensor(0.1), None, isa=cpu.supported_isas()[0])
    weight = SimpleNamespace(num_bits=4)
    module: Any = SimpleNamespace(shape=(12, 96), groups=3, scheme=SimpleNamespace(weight=weight))
    assert plan.token_bytes(module, "linear") == 12 * 48 + kept.nbytes


def test_bytes_of_a_token() -> None:
    weight = SimpleNamespace(num_bits=4)
    module: Any = SimpleNamespace(shape=(10, 33), groups=3, scheme=SimpleNamespace(weight=weight))
    assert plan.token_bytes(module, "linear") == 10 * (17 + 12)
    assert plan.token_bytes(module, "embedding") == 17 + 12
