"""`trace`: run one prompt two ways and show where the numbers part."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelane.cli.output import DtypeOption, JsonOption, emit, table

if TYPE_CHECKING:
    from bytelane.trace import SideDifference


def trace(
    first: Annotated[str, typer.Argument(metavar="A", help="MODEL, or MODEL@numerics,option=n; see below.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The other way to run the same prompt.")],
    prompt: Annotated[str, typer.Option(help="The text both read.")] = "The quick brown fox jumps over the lazy dog.",
    max_tokens: Annotated[int, typer.Option(min=1, help="Read at most this many tokens of it.")] = 128,
    all_layers: Annotated[bool, typer.Option("--all", help="Show equal layers too.")] = False,
    dtype: DtypeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare two ways of running one prompt, layer by layer.

    A way is a model, optionally followed by `@integer`, `@emulated` or `@transformers` (its own Gemma quantizer) and by
    `threads=N`, `batch=N` (copies in one batch) or `chunk=N` (prefill N tokens at a time). Sides with a scale are
    compared as int8 codes. The exit code is 0 whatever is found.

    Example: `bytelane trace MODEL@integer MODEL@emulated`, or `bytelane trace MODEL MODEL@integer,chunk=8,threads=1`
    """
    from bytelane.cli.common import parse_dtype, quiet
    from bytelane.generation import load_tokenizer
    from bytelane.models import resolve_checkpoint
    from bytelane.trace import Way
    from bytelane.trace import trace as run_trace

    quiet()
    ways = [Way.parse(first), Way.parse(second)]
    tokenizer = load_tokenizer(resolve_checkpoint(ways[0].model))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0, :max_tokens]
    result = run_trace(ways[0], ways[1], ids, dtype=parse_dtype(dtype))
    if json_output:
        found = {"a": asdict(ways[0]), "b": asdict(ways[1]), **asdict(result), "first_difference": result.first}
        emit(found)
        return
    rows: list[tuple[Any, ...]] = [
        (layer.name, *_cells(layer.input), *_cells(layer.output))
        for layer in result.layers
        if all_layers or layer.input.differing or layer.output.differing
    ]
    if rows:
        columns = ("layer", "inputs differ", "by at most", "at token", "outputs differ", "by at most", "at token")
        table(f"A {ways[0].label}, B {ways[1].label}, {result.tokens} tokens", columns, rows, right=columns[1:])
    equal = len(result.layers) - sum(1 for x in result.layers if x.input.differing or x.output.differing)
    print(f"{equal} of {len(result.layers)} layers are equal on both sides")
    if result.first is None:
        print("no difference anywhere, logits included")
        return
    name, side = result.first
    origin = "the float operations before it" if side == "input" else "the layer's own arithmetic"
    print(f"first difference: the {side} of {name}, so from {origin}" if name != "logits" else "only the logits differ")
    print(
        f"logits: {result.logits.share:.1%} differ, by at most {result.logits.largest_value:.4g}; "
        f"the likeliest token agrees at {result.argmax_agreement:.1%} of positions"
    )


def _cells(side: SideDifference) -> tuple[str, str, str]:
    if not side.differing:
        return ("-", "-", "-")
    by = f"{side.largest_value:.3g}" if side.largest_code is None else f"{side.largest_code} codes"
    return (f"{side.share:.2%}", by, str(side.first_position))
