"""What a quantization did, in full: frozen values that go to JSON as they are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One quantized module.

    Attributes:
        name: the module's name.
        label: `w8a8o8`; `a16` and `o16` stand for a side left in float, a table has only the first part.
        granularity: `"channel"` or `"group:<size>"`, of the weight scales.
        shape: of the weight.
        weight_bytes: of the packed codes.
        input_scale: static input scale, or None for a side left in float (or a table).
        output_scale: likewise.
        input_range: the range method of the input, or None.
        output_range: likewise.
        input_clipped: the share of observed input values beyond the range, 0 to 1, or None.
        output_clipped: likewise.
    """

    name: str
    label: str
    granularity: str
    shape: tuple[int, int]
    weight_bytes: int
    input_scale: float | None = None
    output_scale: float | None = None
    input_range: str | None = None
    output_range: str | None = None
    input_clipped: float | None = None
    output_clipped: float | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """What was quantized, how, from how much text, and what was not.

    Attributes:
        output: the checkpoint's folder.
        storage: `"compressed-tensors"` or `"gemma"`.
        layers: every quantized module, in the model's order.
        unquantized: linear and embedding modules left in float.
        tied: heads that share a quantized embedding's codes, to the embedding.
        untied: heads that shared the float model's embedding and now have a weight of their own.
        shared_inputs: groups of layers that share an input scale.
        windows: calibration windows read.
        tokens: calibration tokens read.
        float_bytes: parameters and buffers of the float model, each counted once, in the dtype they are stored in.
        checkpoint_bytes: safetensors files of the checkpoint.
        seconds: wall time, without loading the float model.
        peak_bytes: the most memory the process has held so far, loading the float model included.
        kv_layers: attention modules with int8 scales of their KV cache.
    """

    output: str
    storage: str
    layers: tuple[LayerReport, ...]
    unquantized: tuple[str, ...]
    tied: dict[str, str]
    untied: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...]
    windows: int
    tokens: int
    float_bytes: int
    checkpoint_bytes: int
    seconds: float
    peak_bytes: int = 0
    kv_layers: int = 0

    @property
    def labels(self) -> dict[str, int]:
        """How many modules have each label, most frequent first: `{"w8a8o8": 203, "w8a8o16": 7}`."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.label] = counts.get(layer.label, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def ranges(self) -> dict[str, int]:
        """How many activation sides each range method served."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            for rule in (layer.input_range, layer.output_range):
                if rule is not None:
                    counts[rule] = counts.get(rule, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, the two summaries included."""
        values: dict[str, Any] = {**dataclasses.asdict(self), "labels": self.labels, "ranges": self.ranges}
        return values

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)
