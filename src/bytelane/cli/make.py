"""`quantize` and `convert`: make a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytelane.cli.output import JsonOption, ModelArgument, ThreadsOption, TrustOption, emit, progress, size, steps
from bytelane.cli.recipe import (
    BitsOption,
    DefaultBitsOption,
    EmbeddingsOption,
    EqualizeOption,
    GgufOption,
    HeadOption,
    RecipeOption,
    RotateOption,
    SourceArgument,
    SplitOption,
    StorageOption,
    StoredDtypeOption,
    WindowOption,
    chosen_recipe,
)

if TYPE_CHECKING:
    from bytelane.quantize import QuantizationReport

OutputArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")]


def convert(
    model: ModelArgument,
    out: OutputArgument,
    to: Annotated[str, typer.Option("--to", help="**compressed-tensors** or **gemma**.")],
    drop_kv_scales: Annotated[
        bool, typer.Option("--drop-kv-scales", help="Leave the KV-cache scales out, for runtimes that refuse them.")
    ] = False,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a checkpoint in the other storage without touching a code.

    Codes and scale values are copied, never recomputed, so converting back gives the same tensors. What the target has
    no place for is said; a module it cannot hold is an error, and nothing is written.
    """
    from bytelane.checkpoint import convert_checkpoint
    from bytelane.cli.common import quiet
    from bytelane.models import open_model

    quiet()
    checkpoint, _ = open_model(model, trust_remote_code=trust_remote_code)
    with checkpoint, progress("converting") as report:
        done = convert_checkpoint(
            checkpoint, out, to, drop_kv_scales=drop_kv_scales, overwrite=overwrite, progress=report
        )
    if json_output:
        emit({"from": str(checkpoint.directory), "to": str(out), "storage": to, **asdict(done)})
        return
    lines = [f"wrote {out}: {done.modules} quantized modules and {done.tensors} other tensors, as {to}"]
    lines += [f"kept  {note}" for note in done.kept]
    lines += [f"lost  {note}" for note in done.lost or ("nothing",)]
    print("\n".join(lines))


def quantize(
    source: SourceArgument,
    out: OutputArgument,
    text: Annotated[
        list[Path], typer.Option("--text", help="Text to observe the model on (.txt, .utf8, .jsonl); repeatable.")
    ],
    recipe: RecipeOption = None,
    default_bits: DefaultBitsOption = None,
    bits: BitsOption = None,
    granularity: Annotated[
        list[str] | None, typer.Option(help="PATTERN=channel or PATTERN=SIZE: which inputs share a scale; repeatable.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="PATTERN: leave these modules in float; repeatable.")] = None,
    no_input: Annotated[
        list[str] | None, typer.Option(help="PATTERN: leave these layers' inputs in float; repeatable.")
    ] = None,
    no_output: Annotated[
        list[str] | None, typer.Option(help="PATTERN: leave these layers' outputs in float; repeatable.")
    ] = None,
    embeddings: EmbeddingsOption = None,
    head: HeadOption = None,
    range_: Annotated[
        str | None, typer.Option("--range", help="Activation ranges: minmax, mse, or a percentile such as 99.99.")
    ] = None,
    rotate: RotateOption = None,
    equalize: EqualizeOption = None,
    rounding: Annotated[str | None, typer.Option(help="Of the weights: **nearest** or **gptq**.")] = None,
    search: Annotated[
        int | None, typer.Option(min=0, help="Choose the ranges of this many of the loudest tensors by loss.")
    ] = None,
    kv_cache: Annotated[
        bool | None, typer.Option("--kv-cache/--no-kv-cache", help="Observe int8 scales of the KV cache too.")
    ] = None,
    storage: StorageOption = None,
    split: SplitOption = "all",
    window: WindowOption = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows to observe.")] = 32,
    gguf: GgufOption = None,
    dtype: StoredDtypeOption = "bfloat16",
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what is observed in FILE, and go on from it where it is there."),
    ] = None,
    overwrite: OverwriteOption = False,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    r"""Make a wNa8o8 checkpoint from a float model and a text.

    The float model reads the text while the range of every layer's input and output is observed; layers that read the
    same tensor share one input scale. Weights are rounded to nearest, or by GPTQ with the integer layers' own inputs.
    The folder that comes out is complete, or it does not come out at all.

    Example: `bytelane quantize ./my-model ./my-model-w4 --text wiki.txt --bits 'mlp\.=4' --range 99.99`
    """
    from bytelane.cli.common import check_split, parse_dtype, quiet, set_threads, source_folder
    from bytelane.quantize import quantize_checkpoint

    quiet()
    set_threads(threads)
    given = {
        "default_bits": default_bits,
        "bits": bits,
        "granularity": granularity,
        "ignore": ignore,
        "no_input": no_input,
        "no_output": no_output,
        "embeddings": embeddings,
        "head": head,
        "range": range_,
        "storage": storage,
        "rotate": rotate,
        "equalize": equalize,
        "rounding": rounding,
        "search": search,
        "kv_cache": kv_cache,
    }
    made = chosen_recipe(recipe, given)
    chosen = parse_dtype(dtype)
    assert chosen is not None
    with steps() as report_step:
        report = quantize_checkpoint(
            source_folder(source),
            out,
            made,
            text,
            gguf_file=gguf,
            split=check_split(split),
            window=window,
            max_windows=windows,
            dtype=chosen,
            resume=resume,
            overwrite=overwrite,
            progress=report_step,
        )
    if json_output:
        emit({"recipe": made.model_dump(mode="json"), **report.to_dict()})
        return
    print("\n".join(_summary(report)))


def _names(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _summary(report: QuantizationReport) -> list[str]:
    """The recipe as it was carried out, exceptions first."""
    labels = ", ".join(f"{count} x {label}" for label, count in report.labels.items())
    ranges = ", ".join(f"{name} on {count} sides" for name, count in report.ranges.items())
    exceptions = {
        "input in float": [r.name for r in report.layers if "a16" in r.label],
        "output in float": [r.name for r in report.layers if "o16" in r.label],
        "all in float": list(report.unquantized),
    }
    clipped = max((r.output_clipped or 0.0 for r in report.layers), default=0.0)
    lines = [
        f"wrote {report.output} as {report.storage} in {report.seconds:.0f} s; "
        f"at most {size(report.peak_bytes)} of memory",
        f"layers       {labels}",
        f"ranges       {ranges or 'none'}, from {report.tokens} tokens; "
        f"{len(report.shared_inputs)} groups of layers share an input scale; "
        f"at most {clipped:.2%} of an output clipped",
        f"size         {size(report.float_bytes)} in {size(report.checkpoint_bytes)}, "
        f"{report.checkpoint_bytes / report.float_bytes:.0%}",
    ]
    if report.kv_layers:
        lines.append(f"KV cache     int8 scales in {report.kv_layers} attention layers")
    lines += [f"{what:<16} {len(names)}: {_names(names)}" for what, names in exceptions.items() if names]
    lines += [f"tied         {h} shares the codes of {e}" for h, e in report.tied.items()]
    lines += [f"untied       {h} has a weight of its own now" for h in report.untied]
    return lines
