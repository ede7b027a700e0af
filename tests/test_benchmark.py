"""`bytelane bench linear`: limits that are limits, results that add up, arguments that are refused."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from bytelane import benchmark
from bytelane.benchmark_peers import Layer, Peers, copies
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


def test_group_sizes_are_layers_of_their_own_and_their_scales_count(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--quick", "--shapes", "512x64", "--rows", "1", "--bits", "3,4", "--peers", "none", "--json")
    code, out = run(capsys, *arguments, "--group-size", "0,32,128")
    assert code == 0
    results = json.loads(out)["results"]
    assert [(r["group_size"], r["bits"]) for r in results] == [(g, b) for g in (0, 32, 128) for b in (3, 4)]
    for r in results:
        if r["bound"] == "read":
            size = 64 * (512 * r["bits"] // 8 + 4 * (512 // r["group_size"] if r["group_size"] else 1))
            assert r["limit_seconds"] == pytest.approx(size / r["bandwidth"])


@pytest.mark.parametrize(
    "wrong",
    [
        ("--shapes", "12"),
        ("--rows", "0"),
        ("--bits", "9"),
        ("--peers", "abacus"),
        ("--group-size", "100"),
        ("--group-size", "32,100"),
        ("--vllm-python", "no-such-python"),
        ("--seconds", "0"),
    ],
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


def test_a_run_leaves_its_json_in_a_file_with_the_machine_and_nothing_private(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    code, out = run(
        capsys, "--quick", "--shapes", "256x64", "--rows", "1", "--peers", "none", "--output", str(file), "--json"
    )
    assert code == 0
    found = json.loads(file.read_text())
    assert found == json.loads(out)
    assert found["machine"]
    assert found["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert [limits["threads"] for limits in found["limits_by_threads"]] == benchmark.thread_counts(found["threads"])
    assert found["limits"] == found["limits_by_threads"][-1]
    assert str(Path.home()) not in file.read_text()


def test_a_peer_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--quick", "--shapes", "256x64", "--rows", "1", "--bits", "3,4", "--peers", "emulation,vllm", "--json")
    code, out = run(capsys, *arguments)
    assert code == 0
    found = json.loads(out)
    assert "--vllm-python" in found["skipped"]["vllm at 4 bits"]
    assert found["skipped"]["emulation at 3 bits"] == "takes 2, 4 and 8 bits"
    assert [set(r["ratios"]) for r in found["results"]] == [set(), {"emulation"}]


def test_a_vllm_process_that_ends_is_an_error_and_not_a_result() -> None:
    layer, pool = Layer(64, 32, 1, 4), torch.zeros(1 << 20, dtype=torch.uint8)
    # this environment's Python has no vllm, or one whose operators load: then there is nothing to see here
    with Peers(("vllm",), Path(sys.executable)) as peers:
        try:
            import vllm  # noqa: F401

            pytest.skip("vllm is installed beside bytelane")
        except ImportError:
            pass
        with pytest.raises(RuntimeError, match="vLLM's process ended"):
            peers.make("vllm", layer, torch.zeros(1, 64, dtype=torch.bfloat16), pool)


def test_a_vllm_whose_build_has_no_int4_matmul_is_left_out(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nwhile read request; do echo no; done\n")
    stand_in.chmod(0o755)
    layer, pool = Layer(64, 32, 1, 4), torch.zeros(1 << 20, dtype=torch.uint8)
    with Peers(("vllm",), stand_in) as peers:
        assert peers.make("vllm", layer, torch.zeros(1, 64, dtype=torch.bfloat16), pool) is None
    assert peers.skipped == {"vllm at 4 bits": "its build for this CPU has no int4 matmul"}


@pytest.mark.parametrize("name", ["bfloat16", "onednn", "xnnpack", "onnxruntime", "emulation"])
def test_peers_that_are_installed_run_and_rotate(name: str) -> None:
    layer, pool = Layer(256, 128, 2, 8), torch.zeros(1 << 20, dtype=torch.uint8)
    with Peers((name,)) as peers, torch.inference_mode():
        call = peers.make(name, layer, torch.randn(2, 256).to(torch.bfloat16), pool)
        if call is None:
            pytest.skip(peers.skipped.popitem()[1])
        assert all(call() > 0 for _ in range(3))
    assert peers.skipped == {}


def test_contenders_take_turns_and_a_slow_one_sits_out() -> None:
    seen: list[str] = []

    def contender(name: str, took: float) -> benchmark.Timed:
        def call() -> float:
            seen.append(name)
            return took

        return call

    calls = {"quick": contender("quick", 0.1), "slow": contender("slow", 2.0)}
    times = benchmark.measure(calls, 6.0, most=10, pause=0.0)
    turns = seen[::2]
    assert turns == seen[1::2]  # each twice in a row
    rounds = [tuple(turns[i : i + 2]) for i in range(0, 2 * benchmark.FEWEST_ROUNDS, 2)]
    assert all(set(names) == set(calls) for names in rounds)
    assert turns[2 * benchmark.FEWEST_ROUNDS :] == ["quick"] * (10 - benchmark.FEWEST_ROUNDS)
    assert times["slow"] == [2.0] * benchmark.FEWEST_ROUNDS + [None] * (10 - benchmark.FEWEST_ROUNDS)
    assert times["quick"] == [0.1] * 10
    assert benchmark.median(times["slow"]) == 2.0
    assert benchmark.median_ratio(times["slow"], times["quick"]) == pytest.approx(20.0)
    fewest = benchmark.measure({"slow": contender("slow", 2.0)}, 1.0, pause=0.0)
    assert fewest == {"slow": [2.0] * benchmark.FEWEST_ROUNDS}


def test_short_calls_wake_the_processor_and_are_averaged() -> None:
    warm, burst = round(benchmark.WARM / 0.001), round(benchmark.BURST / 0.0005)
    turn = [0.001] * warm + [0.0004, 0.0006] * (burst // 2)
    took = itertools.cycle(turn)
    calls = {"short": lambda: next(took)}
    times = benchmark.measure(calls, 1.0, most=4, pause=0.0)
    assert times == {"short": [pytest.approx(0.0005)] * 4}
    assert next(took) == 0.001  # every turn was a whole one


def test_every_contender_follows_every_other_one() -> None:
    seen: list[str] = []
    names = ("read", "two", "four", "eight")

    def contender(name: str) -> benchmark.Timed:
        def call() -> float:
            seen.append(name)
            return 1.0

        return call

    benchmark.measure({name: contender(name) for name in names}, 1e9, pause=0.0)
    turns = seen[::2]
    assert all(turns.count(name) == benchmark.MOST_ROUNDS for name in names)
    pairs = {pair for pair in itertools.pairwise(turns) if pair[0] != pair[1]}
    assert pairs == set(itertools.permutations(names, 2))


def test_thread_counts_and_copies() -> None:
    assert [benchmark.thread_counts(n) for n in (1, 2, 3, 6, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert copies(1 << 40, 1) == copies(4, 512) == 2
    assert copies(16 << 20, 1) == 8
    assert copies(4, 1) == 48


def test_limits_leave_the_thread_count_as_it_was() -> None:
    before = torch.get_num_threads()
    found = benchmark.measure_scaling(cpu.supported_isas()[0], [8], quick=True)
    assert [limits.threads for limits in found] == benchmark.thread_counts(before)
    assert torch.get_num_threads() == before
