"""`bench`: what a layer costs here, beside the machine's limits and other runtimes."""

from __future__ import annotations

from typing import Annotated

import typer

from bytelane.cli.output import JsonOption, ThreadsOption, emit_line, table

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
    shapes: Annotated[str, typer.Option(help="INxOUT, with commas.")] = "1536x6144,1536x12288,12288x1536,4096x14336",
    rows: Annotated[str, typer.Option(help="Rows of activations (M), with commas.")] = "1,8,16,128,512",
    bits: Annotated[str, typer.Option(help="Weight widths, with commas.")] = "2,4,8",
    group_size: Annotated[int, typer.Option(min=0, help="Inputs per weight scale; 0: one scale per channel.")] = 0,
    peers: Annotated[str, typer.Option(help="Of bfloat16, onednn, xnnpack; or `none`.")] = "bfloat16,onednn,xnnpack",
    threads: ThreadsOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: only shows that it works.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Time the integer linear layer with cold weights, as a share of what the machine can do and beside peers.

    The last line is JSON; `--json` prints nothing else. `ratio` is the peer's time over ours.

    Example: `bytelane bench linear --shapes 1536x6144 --rows 1,128 --threads 2`
    """
    from bytelane import benchmark
    from bytelane.cli.common import set_threads
    from bytelane.dispatch import machine

    set_threads(threads)
    widths = _numbers(bits, "--bits", low=2, high=8)
    counts = _numbers(rows, "--rows", low=1, high=65536)
    wanted = () if peers == "none" else tuple(peers.split(","))
    if unknown := set(wanted) - set(benchmark.PEERS):
        raise typer.BadParameter(f"must be of {', '.join(benchmark.PEERS)}, found {unknown}", param_hint="--peers")
    sizes = _shapes(shapes)
    if any(group_size and k % group_size for k, _ in sizes):
        raise typer.BadParameter(f"{group_size} must divide the inputs of {shapes}", param_hint="--group-size")
    limits = benchmark.measure_limits(machine().isas[0], widths, quick=quick)
    overhead = benchmark.call_overhead()
    results = []
    for k, n in sizes:
        for m in counts:
            rounds = benchmark.rounds_of(k, n, m, quick=quick)
            results += benchmark.run_layer(k, n, m, widths, limits, group_size=group_size, rounds=rounds, peers=wanted)
    if not json_output:
        rates = ", ".join(f"{rate / 1e9:.0f} at {b} bits" for b, rate in limits.dot_rate.items())
        title = (
            f"{limits.isa}, {limits.threads} threads; limits: read {limits.bandwidth / 1e9:.1f} GB/s, multiply-adds "
            f"G/s {rates}; a call alone {overhead * 1e6:.1f} us"
        )
        columns = ["in x out", "M", "bits", "us", "GB/s", "GMAC/s", "% of limit", "bound", *wanted]
        cells = [
            (
                f"{r.in_features}x{r.out_features}",
                r.rows,
                r.bits,
                f"{r.seconds * 1e6:.0f}",
                f"{r.limit_seconds / r.seconds * r.bandwidth / 1e9:.1f}" if r.bound == "read" else "",
                f"{r.rows * r.in_features * r.out_features / r.seconds / 1e9:.0f}",
                f"{100 * r.of_limit:.0f}",
                r.bound,
                *(f"{r.ratios[p]:.2f}" if p in r.ratios else "-" for p in wanted),
            )
            for r in results
        ]
        table(title, columns, cells, right=columns[1:])
    emit_line(benchmark.summary(limits, overhead, results))
