"""`compare`: what each layer, and the whole, lost between two models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelane.cli.output import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ThreadsOption,
    emit,
    progress,
    remarks,
    table,
    write_json,
)

if TYPE_CHECKING:
    from bytelane.report.compare import CompareResult, LayerComparison
    from bytelane.report.measures import SideComparison

TextOption = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Text both read (.txt, .utf8, .jsonl); repeatable. A page that ships by default."),
]
SHOWN = 12


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The reference: a float model, or MODEL@numerics.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The model to judge.")],
    text: TextOption = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window; each window starts afresh.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Read at most this many tokens.")] = 4096,
    split: Annotated[
        str,
        typer.Option(help="For files of `<doc>` elements: **evaluation** (every fourth), **calibration** or **all**."),
    ] = "all",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also put each layer of B into A alone: one more run of A a layer.")
    ] = False,
    all_layers: Annotated[bool, typer.Option("--all", help="Show every layer, not the worst ones.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON, for `bytelane report`.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare two models on the same text, layer by layer and as a whole.

    A and B are each a float model (a folder, or a GGUF file), a checkpoint, or a checkpoint in other numerics:
    `MODEL@integer`, `MODEL@emulated`, `MODEL@transformers`. The two run side by side, one layer at a time, so memory
    does not grow with the text. *alone* is a layer of B on A's input: what that layer loses by itself.

    Example: `bytelane compare ./my-model ./my-model-w4a8o8 --text wiki.txt`
    """
    from bytelane.cli.common import check_device, check_split, parse_dtype, quiet, set_threads
    from bytelane.report.findings import comparison_json
    from bytelane.report.subject import Subject, compare_subjects

    quiet()
    set_threads(threads)
    subjects = Subject.parse(first), Subject.parse(second)
    with progress("comparing") as report:
        result = compare_subjects(
            *subjects,
            text_files=text,
            split=check_split(split),
            window=window,
            max_tokens=max_tokens,
            dtype=parse_dtype(dtype),
            device=check_device(device),
            with_sensitivity=sensitivity,
            progress=report,
        )
    document = comparison_json(*subjects, result)
    if output is not None:
        write_json(output, document)
        remarks().print(f"wrote {output}", style="dim", highlight=False)
    if json_output:
        emit(document)
        return
    _print(f"A {subjects[0].label}, B {subjects[1].label}, {result.tokens} predicted tokens", result, all_layers)


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _clipped(side: SideComparison) -> str:
    low, high = side.b.clipped_low, side.b.clipped_high
    if low is None or high is None:
        return "-"
    return "0" if not low + high else f"{_share(low)} / {_share(high)}"


def _share(value: float) -> str:
    if value >= 5e-4 or not value:
        return f"{value:.2%}" if value else "0"
    return f"{value * 1e6:.0f} ppm" if value >= 1e-6 else "< 1 ppm"


def _used(side: SideComparison) -> str:
    used = side.b.range_used
    return "-" if used is None else f"{used:.0%}"


def _row(layer: LayerComparison) -> tuple[Any, ...]:
    scheme = layer.scheme_b if layer.scheme_a in ("float", layer.scheme_b) else f"{layer.scheme_a}, {layer.scheme_b}"
    extra = () if layer.sensitivity is None else (f"{layer.sensitivity:.2g}",)
    return (
        layer.name,
        scheme,
        *(_decibels(v) for v in (layer.input.sqnr, layer.output.sqnr, layer.alone)),
        *(f(side) for side in (layer.input, layer.output) for f in (_clipped, _used)),
        *extra,
    )


def _badness(layer: LayerComparison) -> float:
    return layer.sensitivity if layer.sensitivity is not None else -(math.inf if layer.alone is None else layer.alone)


def _print(title: str, result: CompareResult, all_layers: bool) -> None:
    differing = [layer for layer in result.layers if layer.input.differing or layer.output.differing]
    shown = list(result.layers) if all_layers else sorted(differing, key=_badness, reverse=True)[:SHOWN]
    if shown:
        columns = ["layer", "scheme", "SQNR in", "out", "alone", "in clipped", "used", "out clipped", "used"]
        columns += ["KL alone"] if shown[0].sensitivity is not None else []
        what = "every layer" if all_layers else f"the {len(shown)} layers that lose most"
        table(f"{title}; {what}", columns, [_row(layer) for layer in shown], right=columns[2:])
    for line in summary(result):
        print(line)


def summary(result: CompareResult) -> list[str]:
    """The whole in a few lines."""
    from bytelane.report.findings import findings

    both = result.perplexity
    lines = [
        f"perplexity   {both.reference.perplexity:.3f} in A, {both.quantized.perplexity:.3f} in B: "
        f"{both.nll_increase:+.4f} +- {both.standard_error:.4f} nats a token",
        f"KL           {result.kl:.4g} +- {result.kl_standard_error:.2g} nats a token, {result.kl_largest:.3g} at most",
        f"top-1        {result.top1_agreement:.1%} of positions agree",
    ]
    equal = sum(1 for layer in result.layers if not layer.input.differing and not layer.output.differing)
    lines.append(f"layers       {equal} of {len(result.layers)} are equal on both sides")
    if result.first_difference is not None:
        name, side = result.first_difference
        origin = "what lies before it" if side == "input" else "the layer itself"
        lines.append(f"differs      first at the {side} of {name}, so from {origin}")
    if result.first_below is not None:
        lines.append(f"diverges     the output falls below 20 dB first at {result.first_below}")
    lines += [
        f"only in {w}    {len(n)}: {', '.join(n[:4])}" for w, n in (("A", result.only_a), ("B", result.only_b)) if n
    ]
    lines += [f"look at      {finding}" for finding in findings(result)]
    return lines
