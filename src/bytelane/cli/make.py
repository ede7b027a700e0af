"""`quantize` and `convert`: make a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bytelane.cli.output import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    TrustOption,
    emit,
    progress,
    size,
    steps,
)
from bytelane.cli.planning import (
    AverageBitsOption,
    LossBudgetOption,
    LossesOption,
    SizeBudgetOption,
    WidthsOption,
    WritePlanOption,
    chosen_budget,
    describe_plan,
    parse_widths,
    plan_lines,
)
from bytelane.cli.recipe import (
    BitsOption,
    DefaultBitsOption,
    EmbeddingsOption,
    EqualizeOption,
    GgufOption,
    HeadOption,
    PlanOption,
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
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The folder to make; may be left out with --write-plan.")
    ] = None,
    *,
    text: Annotated[
        list[Path], typer.Option("--text", help="Text to observe the model on (.txt, .utf8, .jsonl); repeatable.")
    ],
    recipe: RecipeOption = None,
    plan: PlanOption = None,
    size_budget: SizeBudgetOption = None,
    average_bits: AverageBitsOption = None,
    loss_budget: LossBudgetOption = None,
    widths: WidthsOption = None,
    losses: LossesOption = None,
    write_plan: WritePlanOption = None,
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
    learn_scales: Annotated[
        int | None,
        typer.Option(min=0, metavar="STEPS", help="Learn all scales together in so many steps, a window each."),
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
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    r"""Make a wNa8o8 checkpoint from a float model and a text.

    The float model reads the text while the range of every layer's input and output is observed; layers that read the
    same tensor share one input scale. Weights are rounded to nearest, or by GPTQ with the integer layers' own inputs.
    The folder that comes out is complete, or it does not come out at all.

    With a budget the widths that no --bits pattern gives are chosen: what each would cost is measured on the text, and
    those that cost least are taken. --write-plan keeps the choice in a file; without OUT nothing else is made.

    Example: `bytelane quantize ./my-model ./my-model-w4 --text wiki.txt --bits 'mlp\.=4' --range 99.99`
    """
    from bytelane.cli.common import check_device, check_split, parse_dtype, quiet, set_threads, source_folder
    from bytelane.errors import OutputExistsError
    from bytelane.quantize import plan_checkpoint, quantize_checkpoint

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
        "learn_scales": learn_scales,
        "kv_cache": kv_cache,
    }
    budget = chosen_budget(size_budget, average_bits, loss_budget)
    if budget is not None and plan is not None:
        raise typer.BadParameter(f"the widths are chosen in {plan}; give a budget or a plan", param_hint="--plan")
    if budget is None and (widths, losses, write_plan) != (None, None, None):
        raise typer.BadParameter("go with --size-budget, --average-bits or --loss-budget", param_hint="--write-plan")
    if out is None and write_plan is None:
        raise typer.BadParameter("give the folder to make; only --write-plan does without", param_hint="OUT")
    if out is not None and not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError("exists and is not empty; choose another folder or allow overwriting", file=out)
    made = chosen_recipe(recipe, given, plan, (source, gguf))
    chosen = parse_dtype(dtype)
    assert chosen is not None
    folder, tried = source_folder(source), parse_widths(widths)
    common: dict[str, Any] = {
        "gguf_file": gguf,
        "split": check_split(split),
        "window": window,
        "max_windows": windows,
        "dtype": chosen,
        "device": check_device(device),
    }
    bit_plan = report = None
    if budget is not None:
        with steps() as report_step:
            bit_plan = plan_checkpoint(
                folder, made, text, budget, widths=tried, cache=losses, progress=report_step, **common
            )
        made = bit_plan.to_recipe()
        if write_plan is not None:
            bit_plan.save(write_plan)
    if out is not None:
        with steps() as report_step:
            report = quantize_checkpoint(
                folder, out, made, text, resume=resume, overwrite=overwrite, progress=report_step, **common
            )
    if json_output:
        planned = {} if bit_plan is None else {"plan": describe_plan(bit_plan)}
        done = {} if report is None else report.to_dict()
        emit({"recipe": made.model_dump(mode="json"), **planned, **done})
        return
    lines = [] if bit_plan is None else plan_lines(bit_plan)
    if write_plan is not None:
        lines.insert(0, f"wrote {write_plan}")
    print("\n".join(lines + ([] if report is None else _summary(report))))


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
