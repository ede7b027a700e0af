"""`inspect` and `explain`: what is in a checkpoint, and what would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bytelane.cli.output import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    OverridesOption,
    ThreadsOption,
    TrustOption,
    emit,
    size,
    table,
)
from bytelane.cli.planning import compare_to_plan, describe_plan, plan_in, print_plan


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a hub id, bytelane:small, or a plan file.")
    ],
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Also say where the checkpoint is not as this plan.")
    ] = None,
    overrides: OverridesOption = None,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show a checkpoint's layers: bits, storage, granularity, scales, bytes, totals.

    Reads the configuration, the tensor headers and the scales, and checks them all: a checkpoint that inspects cleanly
    also loads. A side marked *float* has no scale, or a scale of 0 (not calibrated), and is not quantized. With
    `--overrides`, layers are shown as they would be loaded, and those that the file changes are marked.

    A plan (`bytelane quantize --write-plan`) is checked and shown as it is: bits, bytes, what each width costs.

    Example: `bytelane inspect ./my-model --json | jq .totals`
    """
    from bytelane.cli.common import quiet
    from bytelane.models import open_model
    from bytelane.overrides import Overrides
    from bytelane.quantize import BitPlan
    from bytelane.report.describe import describe_checkpoint

    quiet()
    if plan_in(Path(model)):
        shown = BitPlan.load(model)
        if json_output:
            emit(describe_plan(shown))
        else:
            print_plan(shown)
        return
    given, wanted = Overrides(overrides), None if plan is None else BitPlan.load(plan)
    checkpoint, _ = open_model(model, trust_remote_code=trust_remote_code)
    with checkpoint:
        summary = describe_checkpoint(checkpoint, given.resolve(checkpoint))
    if wanted is not None and plan is not None:
        summary["not_as_planned"] = compare_to_plan(summary, wanted, plan)
    if json_output:
        emit(summary)
        return
    _print(summary)


def _scale(value: float | None) -> str:
    return "float" if value is None else f"{value:.4g}"


def _print(summary: dict[str, Any]) -> None:
    rows = []
    overridden = set(summary["overridden"])
    for r in summary["layers"]:
        low, high = r["weight_scale_range"]
        sides = ("-", "-") if r["kind"] == "embedding" else (_scale(r["input_scale"]), _scale(r["output_scale"]))
        shape = f"{r['shape'][0]} x {r['shape'][1]}"
        scale = f"{low:.3g} .. {high:.3g}"
        name = r["name"] + (" (overridden)" if r["name"] in overridden else "")
        rows.append((name, r["scheme"], shape, r["granularity"], r["storage"], scale, *sides, size(r["bytes"])))
    for r in summary["rounded_at_load"]:
        shape, sides = f"{r['shape'][0]} x {r['shape'][1]}", (_scale(r["input_scale"]), _scale(r["output_scale"]))
        name, bytes_ = f"{r['name']} (overridden)", size(r["bytes"])
        rows.append((name, r["scheme"], shape, "channel", "float", "rounded at load", *sides, bytes_))
    table(
        f"{summary['architecture']}, {summary['storage']}",
        ("layer", "scheme", "out x in", "scales", "storage", "weight scale", "input scale", "output scale", "bytes"),
        rows,
        right=("bytes", "input scale", "output scale"),
    )
    totals = summary["totals"]
    schemes = ", ".join(f"{count} x {label}" for label, count in sorted(totals["by_scheme"].items()))
    lines = [
        f"quantized    {totals['quantized_modules']} modules ({schemes}), "
        f"{totals['quantized_weights'] / 1e6:.1f} M weights in {size(totals['quantized_bytes'])}",
        f"unquantized  {totals['plain_tensors']} tensors in {size(totals['plain_bytes'])}"
        + (f"; linear or embedding: {', '.join(summary['unquantized'])}" if summary["unquantized"] else ""),
        f"KV cache     int8 scales for {len(summary['kv_cache_scales'])} attention modules"
        if summary["kv_cache_scales"]
        else "KV cache     no scales",
    ]
    lines += [f"tied         {head} shares {source}" for head, source in summary["tied"].items()]
    bare = [f"{name} ({' and '.join(sides)})" for name, sides in summary["no_scales"].items()]
    if bare:
        lines.append(f"no scales    {', '.join(bare[:8])}" + (f" and {len(bare) - 8} more" if len(bare) > 8 else ""))
    lines += [f"note         {note}" for note in summary["notes"]]
    if "not_as_planned" in summary:
        lines += [f"plan         {line}" for line in summary["not_as_planned"] or ("every layer is as planned",)]
    print("\n".join(lines))


def explain(
    model: ModelArgument,
    rows: Annotated[
        list[int] | None, typer.Option("--rows", help="Rows of activations (M); repeatable. 1 is decoding.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device type to explain for: cpu or cuda.")] = "cpu",
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    overrides: OverridesOption = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read no weight; does not say which decoder layers run natively.")
    ] = False,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show what runs each layer, what a token costs, and why it is not something better.

    For each layer: its kernel, how the kernel cuts it up, how many threads share it, and the bytes that one token reads
    of it. Then why the better-placed kernels were passed over, and which decoder layers run as native calls, and why
    the others do not. The choice depends on the device, the CPU's instruction sets, the layer's bits and granularity,
    and the number of rows. `BYTELANE_CPU_ISA=portable` (or avx2) limits it; the results are the same bits.

    Example: `bytelane explain ./my-model --rows 1 --json | jq .totals`
    """
    import torch

    from bytelane.cli.common import parse_dtype, quiet, set_threads
    from bytelane.dispatch import machine
    from bytelane.models import load_model, open_model
    from bytelane.overrides import Overrides
    from bytelane.report.describe import describe_kernels
    from bytelane.report.plan import describe_decoder, describe_layers

    quiet()
    set_threads(threads)
    given, chosen, counts = Overrides(overrides), parse_dtype(dtype), rows or [1, 512]
    checkpoint, skeleton = open_model(model, dtype=chosen, trust_remote_code=trust_remote_code, text_only=True)
    with checkpoint:
        resolved = dict(given.resolve(checkpoint))
        plan = describe_layers(checkpoint, resolved, skeleton.dtype, device, counts, torch.get_num_threads())
        choices = describe_kernels(checkpoint.modules.values(), skeleton.dtype, device, counts)
    if device == "cpu" and not headers_only:
        loaded = load_model(
            model, dtype=chosen, text_only=True, overrides=overrides, trust_remote_code=trust_remote_code
        )
        plan |= describe_decoder(loaded)
    plan = {"machine": list(machine().isas), "device": device, "dtype": str(skeleton.dtype), **plan, "choices": choices}
    if json_output:
        emit(plan)
        return
    _print_plan(plan)


def _print_plan(plan: dict[str, Any]) -> None:
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in plan["layers"]:
        alike.setdefault((r["rows"], r["op"], r["scheme"], *r["shape"], r["kernel"]), []).append(r)
    table(
        f"CPU instruction sets: {', '.join(plan['machine'])}; device {plan['device']}; {plan['dtype']}",
        ("layers", "scheme", "out x in", "rows", "kernel", "blocking", "threads", "bytes per token", "%"),
        [
            (
                f"{len(same)} x {same[0]['name']}" if len(same) > 1 else same[0]["name"],
                same[0]["scheme"],
                f"{same[0]['shape'][0]} x {same[0]['shape'][1]}",
                same[0]["rows"],
                same[0]["kernel"],
                same[0]["blocking"] or same[0]["about"],
                same[0]["threads"] or "-",
                size(sum(r["bytes_per_token"] for r in same)),
                f"{100 * sum(r['share'] for r in same):.1f}",
            )
            for same in alike.values()
        ],
        right=("rows", "threads", "bytes per token", "%"),
    )
    totals = plan["totals"]
    print(
        f"a token reads  {size(totals['bytes_per_token'])}: {size(totals['quantized_bytes_per_token'])} quantized, "
        f"{size(totals['float_bytes_per_token'])} in {len(totals['float_matrices'])} float matrices"
    )
    if "decoder_layers" in plan:
        refused: dict[str, list[str]] = {}
        for name, reason in plan["not_native"].items():
            refused.setdefault(reason, []).append(name)
        native = plan["decoder_layers"] - len(plan["not_native"])
        print(f"decoder        {native} of {plan['decoder_layers']} layers run as native calls")
        for reason, names in refused.items():
            print(f"not native     {len(names)}, first {names[0]}: {reason}")
    print("passed over")
    for r in plan["choices"]:
        for x in r["refused"]:
            print(f"  {r['op']} {r['scheme']} at {r['rows']} rows: not {x['kernel']}, which {x['reason']}")
