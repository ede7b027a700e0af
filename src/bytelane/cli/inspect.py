"""`inspect` and `explain`: what is in a checkpoint, and what would run it. Neither reads a weight."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bytelane.cli.output import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    OverridesOption,
    TrustOption,
    emit,
    size,
    table,
)


def inspect(
    model: ModelArgument,
    overrides: OverridesOption = None,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show a checkpoint's layers: bits, storage, granularity, scales, bytes, totals.

    Reads the configuration, the tensor headers and the scales, and checks them all: a checkpoint that inspects cleanly
    also loads. A side marked *float* has no scale, or a scale of 0 (not calibrated), and is not quantized. With
    `--overrides`, layers are shown as they would be loaded, and those that the file changes are marked.

    Example: `bytelane inspect ./my-model --json | jq .totals`
    """
    from bytelane.cli.common import quiet
    from bytelane.models import open_model
    from bytelane.overrides import Overrides
    from bytelane.report.describe import describe_checkpoint

    quiet()
    given = Overrides(overrides)
    checkpoint, _ = open_model(model, trust_remote_code=trust_remote_code)
    with checkpoint:
        summary = describe_checkpoint(checkpoint, given.resolve(checkpoint))
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
    print("\n".join(lines))


def explain(
    model: ModelArgument,
    rows: Annotated[
        list[int] | None, typer.Option("--rows", help="Rows of activations (M); repeatable. 1 is decoding.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device type to explain for: cpu or cuda.")] = "cpu",
    dtype: DtypeOption = None,
    json_output: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show which kernel each layer gets, and why not the others.

    The choice depends on the device, the CPU's instruction sets, the layer's bits and granularity, and the number of
    rows. `BYTELANE_CPU_ISA=portable` (or avx2) limits it; the results are the same bits.
    """
    from bytelane.cli.common import parse_dtype, quiet
    from bytelane.dispatch import machine
    from bytelane.models import open_model
    from bytelane.report.describe import describe_kernels

    quiet()
    checkpoint, skeleton = open_model(model, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code)
    checkpoint.close()
    result = describe_kernels(checkpoint.modules.values(), skeleton.dtype, device, rows or [1, 512])
    if json_output:
        emit({"machine": list(machine().isas), "device": device, "dtype": str(skeleton.dtype), "choices": result})
        return
    table(
        f"CPU instruction sets: {', '.join(machine().isas)}; device {device}; {skeleton.dtype}",
        ("op", "scheme", "rows", "layers", "kernel", "how", "why not the better-placed ones"),
        [
            (
                r["op"],
                r["scheme"],
                r["rows"],
                f"{len(r['layers'])}, first {r['layers'][0]}",
                r["kernel"],
                r["about"],
                "\n".join(f"{x['kernel']}: {x['reason']}" for x in r["refused"]) or "none is better placed",
            )
            for r in result
        ],
        right=("rows",),
    )
