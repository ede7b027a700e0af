"""What is in a checkpoint, as JSON values: the same for `inspect`, for a report, and for a program that asks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from bytelane.checkpoint import Checkpoint, QuantizedModule
from bytelane.dispatch import Problem, explain
from bytelane.overrides import ScaleOverride, missing_sides
from bytelane.scheme import Kind, LinearScheme

PLE_PROJECTION = "per_layer_model_projection"
"""Gemma 4's linear that the phone quantizes and no checkpoint has scales for."""


def describe_checkpoint(checkpoint: Checkpoint, resolved: Mapping[str, ScaleOverride]) -> dict[str, Any]:
    """Layers, totals and notes of an open checkpoint; reads headers and scales only.

    Args:
        checkpoint: the open checkpoint.
        resolved: overrides by layer, as `Overrides.resolve` gives them.
    """
    layers = [
        _describe(checkpoint, module, resolved.get(module.name, ScaleOverride()))
        for module in checkpoint.modules.values()
    ]
    rounded = {name: override for name, override in resolved.items() if override.num_bits is not None}
    unquantized = [name for name in checkpoint.ignored if name not in rounded]
    plain = sum(checkpoint.plain_bytes(name) for name in checkpoint.plain)
    return {
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


def describe_kernels(
    modules: Iterable[QuantizedModule], dtype: torch.dtype, device: str, rows: Sequence[int]
) -> list[dict[str, Any]]:
    """Which kernel runs which layers, and why not the better-placed ones.

    Args:
        modules: the quantized modules.
        dtype: of activations.
        device: the device type.
        rows: the numbers of rows of activations (M) to ask for.
    """
    modules = list(modules)
    groups: dict[tuple[Problem, str], list[str]] = {}
    for m in rows:
        for module in modules:
            scheme = module.scheme
            op = "embedding"
            if module.kind is Kind.LINEAR and isinstance(scheme, LinearScheme):
                op = "linear" if scheme.quantize_input else "linear_weight_only"
            grouped = scheme.weight.group_size or 0 if op == "linear" else 0
            problem = Problem(op, device, dtype, scheme.weight.num_bits, grouped, m)
            groups.setdefault((problem, scheme.label), []).append(module.name)
    result: list[dict[str, Any]] = []
    for (problem, label), names in groups.items():
        choice = explain(problem)
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
    return result
