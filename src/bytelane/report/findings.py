"""What a comparison says: what a person should look at, and the JSON that a report is made of."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import asdict
from typing import Any

from bytelane.report.compare import CompareResult
from bytelane.report.subject import Subject

FORMAT = "bytelane-comparison"
CLIPPED = 0.01
"""A side that clips a larger share of its values is worth a look."""
WASTED = 0.1
"""So is one that uses a smaller part of its static range."""
WEAK = 10.0
"""dB: and a layer whose own output is noisier than this."""


def _count(found: Sized, what: str) -> str:
    return f"{len(found)} {what}" + ("" if len(found) == 1 else "s")


def findings(result: CompareResult) -> list[str]:
    """What a person should look at, worst kinds first, one sentence each."""
    found = []
    sides = [(layer, side, getattr(layer, side)) for layer in result.layers for side in ("input", "output")]
    broken = [layer.name for layer, _, side in sides if side.non_finite]
    if broken:
        found.append(f"{_count(broken, 'side')} hold NaN or infinity, first {broken[0]}")
    clipped = [(side.b.clipped, layer.name, which) for layer, which, side in sides if side.b.clipped > CLIPPED]
    if clipped:
        share, name, which = max(clipped)
        found.append(
            f"{_count(clipped, 'side')} clip more than {CLIPPED:.0%} of their values, "
            f"most {share:.1%} at the {which} of {name}"
        )
    wasted = [
        (side.b.range_used, layer.name, which)
        for layer, which, side in sides
        if side.b.range_used is not None and side.b.range_used < WASTED
    ]
    if wasted:
        used, name, which = min(wasted)
        found.append(
            f"{_count(wasted, 'side')} use less than {WASTED:.0%} of their range, "
            f"least {used:.1%} at the {which} of {name}"
        )
    weak = [layer for layer in result.layers if layer.alone is not None and layer.alone < WEAK]
    if weak:
        worst = min(weak, key=lambda layer: layer.alone or 0.0)
        found.append(f"{_count(weak, 'layer')} alone under {WEAK:.0f} dB, worst {worst.name} with {worst.alone:.1f} dB")
    return found


def comparison_json(first: Subject, second: Subject, result: CompareResult) -> dict[str, Any]:
    """A comparison as JSON values, which `bytelane report` reads; infinity and NaN, which JSON has not, become null."""
    return {
        "format": FORMAT,
        "a": {**asdict(first), "label": first.label},
        "b": {**asdict(second), "label": second.label},
        "findings": findings(result),
        **_finite(asdict(result)),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
