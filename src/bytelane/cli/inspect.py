"""`inspect` and `explain`: what is in a checkpoint, and what would run it. Neither reads a weight."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

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
from bytelane.scheme import LinearScheme

if TYPE_CHECKING:
    from bytelane.checkpoint import Checkpoint, QuantizedModule
    from bytelane.overrides import ScaleOverride

PLE_PROJECTION = "per_layer_model_projection"
"""Gemma 4's linear that the phone quantizes and no checkpoint has scales for."""


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
    from bytelane.overrides import Overrides, ScaleOverride, missing_sides

    quiet()
    given = Overrides(overrides)
    checkpoint, _ = open_model(model, trust_remote_code=trust_remote_code)
    with checkpoint:
        resolved = given.resolve(checkpoint)
        layers = [
            _describe(checkpoint, module, resolved.get(module.name, ScaleOverride()))
            for module in checkpoint.modules.values()
        ]
        rounded = {name: override for name, override in resolved.items() if override.num_bits is not None}
        unquantized = [name for name in checkpoint.ignored if name not in rounded]
        plain = sum(checkpoint.plain_bytes(name) for name in checkpoint.plain)
        summary = {
            "model": str(checkpoint.directory),
            "architecture": (checkpoint.config.get("architectures") or [None])[0],
            "storage": checkpoint.storage_name,
            "layers": layers,
            "rounded_at_load": [_describe_rounded(checkpoint, name, o) for name, o in rounded.items()],
            "overridden": sorted(resolved),
            "unquantized": unquantized,
            "no_scales": missing_sides(checkpoint, resolved),
            "notes": _notes(unquantized),
            "tied": dict(checkpoint.tied),
            "kv_cache_scales": {name: {"k": s.k, "v": s.v} for name, s in checkpoint.kv_scales.items()},
            "totals": {
                "quantized_modules": len(layers),
                "quantized_weights": sum(r["shape"][0] * r["shape"][1] for r in layers),
                "quantized_bytes": sum(r["bytes"] for r in layers),
                "plain_tensors": len(checkpoint.plain),
                "plain_bytes": plain,
                "by_scheme": dict(Counter(r["scheme"] for r in layers)),
            },
        }
    if json_output:
        emit(summary)
        return
    _print(summary)


def _scale(value: float | None) -> str:
    return "float" if value is None else f"{value:.4g}"


def _notes(unquantized: list[str]) -> list[str]:
    """What a user may want to do about this checkpoint, one sentence or two each."""
    example = {f"{PLE_PROJECTION}$": {"input_scale": 0.038878, "output_scale": 0.002353, "num_bits": 8}}
    return [
        f"{name} is in float: the phone quantizes it to 8 bits, but the checkpoint carries no scales for it. To do as "
        f"the phone does, give them with --overrides FILE. For E2B the file is {json.dumps(example)}"
        for name in unquantized
        if name.rpartition(".")[2] == PLE_PROJECTION
    ]


def _describe_rounded(checkpoint: Checkpoint, name: str, override: ScaleOverride) -> dict[str, Any]:
    """A float layer that an override rounds when the model is loaded; its weight scales are found then."""
    scheme = override.scheme()
    return {
        "name": name,
        "shape": list(checkpoint.plain[f"{name}.weight"].shape),
        "scheme": scheme.label,
        "bits": override.num_bits,
        "input_scale": None if override.input_scale is None else float(override.input_scale),
        "output_scale": None if override.output_scale is None else float(override.output_scale),
        "bytes": checkpoint.plain_bytes(f"{name}.weight"),
    }


def _describe(checkpoint: Checkpoint, module: QuantizedModule, override: ScaleOverride) -> dict[str, Any]:
    scales = checkpoint.read_scales(module.name)
    scheme = module.scheme
    input_scale, output_scale = override.sides(scales.input_scale, scales.output_scale)
    if isinstance(scheme, LinearScheme):
        scheme = LinearScheme(scheme.weight, input_scale is not None, output_scale is not None)
    low, high = scales.weight_scale.float().aminmax()
    return {
        "name": module.name,
        "kind": module.kind.value,
        "shape": list(module.shape),
        "scheme": scheme.label,
        "bits": module.scheme.weight.num_bits,
        "granularity": module.scheme.weight.granularity,
        "storage": module.storage.value,
        "input_scale": None if input_scale is None else float(input_scale),
        "output_scale": None if output_scale is None else float(output_scale),
        "weight_scale_dtype": str(scales.weight_scale.dtype).removeprefix("torch."),
        "weight_scale_range": [float(low), float(high)],
        "bias": module.bias,
        "bytes": module.weight_bytes + scales.weight_scale.nbytes,
    }


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
    from bytelane.dispatch import Problem, machine
    from bytelane.dispatch import explain as explain_problem
    from bytelane.models import open_model
    from bytelane.scheme import Kind, LinearScheme

    quiet()
    checkpoint, skeleton = open_model(model, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code)
    checkpoint.close()
    groups: dict[tuple[Problem, str], list[str]] = {}
    for m in rows or [1, 512]:
        for module in checkpoint.modules.values():
            scheme = module.scheme
            op = "embedding"
            if module.kind is Kind.LINEAR and isinstance(scheme, LinearScheme):
                op = "linear" if scheme.quantize_input else "linear_weight_only"
            grouped = scheme.weight.group_size or 0 if op == "linear" else 0
            problem = Problem(op, device, skeleton.dtype, scheme.weight.num_bits, grouped, m)
            groups.setdefault((problem, scheme.label), []).append(module.name)
    result: list[dict[str, Any]] = []
    for (problem, label), names in groups.items():
        choice = explain_problem(problem)
        result.append(
            {
                "op": problem.op,
                "scheme": label,
                "rows": problem.rows,
                "kernel": choice.kernel.name,
                "about": choice.kernel.about,
                "refused": [{"kernel": k.name, "reason": reason} for k, reason in choice.refused],
                "unused": [k.name for k in choice.unused],
                "layers": names,
            }
        )
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
