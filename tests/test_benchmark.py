"""`bytelane bench linear`: limits that are limits, results that add up, arguments that are refused."""

from __future__ import annotations

import json

import pytest
import torch

from bytelane import benchmark
from bytelane.cli import main
from bytelane.kernels import cpu
from bytelane.memory import HUGE_PAGE, streamed, streamed_cat, streamed_empty


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "linear", *arguments])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_a_quick_run_reports_every_layer_and_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--quick", "--shapes", "256x512", "--rows", "1,16", "--bits", "3,4", "--peers", "bfloat16")
    code, out = run(capsys, *arguments)
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    results = found["results"]
    assert [(r["rows"], r["bits"]) for r in results] == [(1, 3), (1, 4), (16, 3), (16, 4)]
    for r in results:
        assert r["limit_seconds"] > 0
        assert r["of_limit"] == pytest.approx(r["limit_seconds"] / r["seconds"])
        assert r["kernel"].startswith("cpu.")
        assert set(r["ratios"]) == {"bfloat16"}
    assert found["limits"]["bandwidth"] > 0
    code, out = run(capsys, *arguments, "--json")
    assert code == 0
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    "wrong",
    [("--shapes", "12"), ("--rows", "0"), ("--bits", "9"), ("--peers", "abacus"), ("--group-size", "100")],
    ids=lambda w: w[0],
)
def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str], wrong: tuple[str, str]) -> None:
    assert run(capsys, "--quick", *wrong)[0] == 2


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_peak_dots_counts_what_it_does(isa: str) -> None:
    for bits in (2, 4, 8):
        one, two = (cpu.peak_dots(bits, repeats, isa=isa) for repeats in (1, 2))
        assert two == 2 * one > 0


def test_reading_takes_whole_words() -> None:
    cpu.read_all(torch.zeros(1024, dtype=torch.uint8), isa=cpu.supported_isas()[0])
    assert benchmark.read_bandwidth(cpu.supported_isas()[-1], size=1 << 20, repeats=1) > 0


def test_streamed_memory_holds_the_same_values_and_begins_on_a_huge_page() -> None:
    small, large = torch.arange(100), torch.arange(HUGE_PAGE // 8 * 2 + 3).reshape(-1, 1)
    assert streamed(small) is small
    copy = streamed(large)
    assert torch.equal(copy, large)
    assert copy.data_ptr() % HUGE_PAGE == 0
    assert copy.is_contiguous()
    assert streamed_empty((3, 5), torch.float32).shape == (3, 5)
    both = streamed_cat([large, large[:7]])
    assert torch.equal(both, torch.cat([large, large[:7]]))
    assert both.data_ptr() % HUGE_PAGE == 0
