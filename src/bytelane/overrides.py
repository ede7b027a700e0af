"""Scales a checkpoint lacks, supplied by the user in a small JSON file.

    {
      "per_layer_model_projection$": {"input_scale": 0.038878, "output_scale": 0.002353, "num_bits": 8},
      "^lm_head$": {"input_scale": 0.05}
    }

A key is the full name of a linear layer, or else a regular expression searched for in the names of all linear layers.
What it gives is added, never replaced:

- A quantized layer gets the activation scales it has none of (absent, or 0: not calibrated).
- A layer whose weight the checkpoint holds in float also needs `num_bits`. Its weight is rounded to nearest, one scale
  per output channel, while it is loaded, and the layer becomes an ordinary wNa8o8 one. The phone has integer weights
  there too, but no checkpoint carries them. Without `num_bits` the override is refused: a float weight between
  quantized activations is neither of the two numerics, and would be right on no runtime.

Gemma 4 is why this exists: the phone's graph quantizes `per_layer_model_projection`, of which the checkpoints hold a
float weight and no scales. Nothing is overridden unless asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelane.checkpoint import Checkpoint
from bytelane.checkpoint.container import read_json
from bytelane.errors import CheckpointError, ConfigError
from bytelane.layers import QuantLinear
from bytelane.packing import pack_rows
from bytelane.scheme import Kind, LinearScheme, Numerics, WeightScheme, check_bits
from bytelane.validation import activation_scale, check_integer_form

KEYS = ("input_scale", "output_scale", "num_bits")

OverridesSource = str | Path | Mapping[str, Mapping[str, Any]]
"""A JSON file, or what would be in it."""


@dataclass(frozen=True)
class ScaleOverride:
    """What an override gives one layer.

    Attributes:
        input_scale: float32 `[]`, positive; None where the override does not give it.
        output_scale: likewise.
        num_bits: the width a float weight is rounded to; None for a layer that has codes.
    """

    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    num_bits: int | None = None

    def sides(self, input_scale: Tensor | None, output_scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The layer's own scales with what is missing filled in."""
        return (
            self.input_scale if input_scale is None else input_scale,
            self.output_scale if output_scale is None else output_scale,
        )

    def scheme(self) -> LinearScheme:
        """The scheme of a float layer that is rounded.

        Raises:
            ValueError: the override gives no width.
        """
        if self.num_bits is None:
            raise ValueError("an override without num_bits makes no scheme")
        return LinearScheme(WeightScheme(self.num_bits), self.input_scale is not None, self.output_scale is not None)


def _parse(key: str, value: Any, file: Path | None) -> ScaleOverride:
    if not isinstance(value, Mapping) or not value or set(value) - set(KEYS):
        raise ConfigError(f"must be an object of {', '.join(KEYS)}, found {value}", file=file, tensor=key)
    scales: dict[str, Tensor | None] = {}
    for leaf in ("input_scale", "output_scale"):
        found = value.get(leaf)
        if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
            raise ConfigError(f"must be a number, found {found!r}", file=file, tensor=f"{key}.{leaf}")
        try:
            exact = None if found is None else torch.tensor(found, dtype=torch.float32, device="cpu")
            scales[leaf] = activation_scale(exact, f"{key}.{leaf}")
        except CheckpointError as error:
            raise error.within(file) from error
        if found is not None and scales[leaf] is None:
            raise ConfigError("0 means not calibrated, which needs no override", file=file, tensor=f"{key}.{leaf}")
    if not any(scale is not None for scale in scales.values()):
        raise ConfigError("gives neither an input_scale nor an output_scale", file=file, tensor=key)
    bits = value.get("num_bits")
    if bits is not None:
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise ConfigError(f"must be an integer, found {bits!r}", file=file, tensor=f"{key}.num_bits")
        try:
            check_bits(bits)
        except CheckpointError as error:
            raise error.within(file, key) from error
    return ScaleOverride(scales["input_scale"], scales["output_scale"], bits)


class Overrides:
    """Overrides as they were given, not yet held against a model.

    Attributes:
        entries: by name or pattern.
        file: where they come from; None for a mapping.
    """

    def __init__(self, source: OverridesSource | None) -> None:
        """Read and check a source; None is no overrides.

        Raises:
            ConfigError: not a JSON object of names to `input_scale`, `output_scale` and `num_bits`.
            ScaleError: a scale that is negative, NaN, infinite or without a finite reciprocal.
        """
        self.file = None if source is None or isinstance(source, Mapping) else Path(source).expanduser()
        raw: Mapping[str, Any] = {}
        if self.file is not None:
            raw = read_json(self.file, ConfigError)
        elif isinstance(source, Mapping):
            raw = source
        self.entries = {key: _parse(key, value, self.file) for key, value in raw.items()}

    def _refuse(self, key: str, rule: str) -> ConfigError:
        return ConfigError(rule, file=self.file, tensor=key)

    def resolve(self, checkpoint: Checkpoint) -> dict[str, ScaleOverride]:
        """Which layer of a checkpoint gets what.

        Args:
            checkpoint: an open checkpoint.

        Returns:
            Overrides by the names of linear layers.

        Raises:
            ConfigError: an override that matches no linear layer, that would replace a scale or a width the checkpoint
                has, that leaves a float weight float, or two that match one layer.
            ScaleError: the scale takes the layer's requantization multiplier out of float32.
        """
        linears = checkpoint.linears
        found: dict[str, ScaleOverride] = {}
        owners: dict[str, str] = {}
        for key, override in self.entries.items():
            for name in self._matches(key, linears):
                if name in owners:
                    raise self._refuse(key, f"matches {name}, as {owners[name]!r} does")
                owners[name] = key
                self._check(key, name, override, checkpoint)
                found[name] = override
        return found

    def _matches(self, key: str, linears: tuple[str, ...]) -> list[str]:
        if key in linears:
            return [key]
        try:
            pattern = re.compile(key)
        except re.error as cause:
            raise self._refuse(key, f"neither a linear layer nor a regular expression: {cause}") from cause
        names = [name for name in linears if pattern.search(name)]
        if not names:
            raise self._refuse(key, "matches no linear layer of the model")
        return names

    def _check(self, key: str, name: str, override: ScaleOverride, checkpoint: Checkpoint) -> None:
        """Refuse an override that would replace something, or that does not make a layer of the scheme."""
        module = checkpoint.modules.get(name)
        has_codes = module is not None or name in checkpoint.tied
        if has_codes and override.num_bits is not None:
            raise self._refuse(key, f"{name} has quantized weights; num_bits is for a weight stored in float")
        if not has_codes and override.num_bits is None:
            raise self._refuse(key, f"the weight of {name} is stored in float; num_bits says to how many bits to round")
        if not has_codes and f"{name}.weight" not in checkpoint.plain:
            raise self._refuse(key, f"{name} shares the float weight of another module")
        if module is None:
            return
        scales = checkpoint.read_scales(name)
        for side in ("input_scale", "output_scale"):
            if getattr(override, side) is not None and getattr(scales, side) is not None:
                has = float(getattr(scales, side))
                raise self._refuse(key, f"{name} has an {side.replace('_', ' ')} of its own ({has:g})")
        s_in, s_out = override.sides(scales.input_scale, scales.output_scale)
        try:
            check_integer_form(module.scheme.weight, module.shape[1], scales.weight_scale, s_in, s_out, None)
        except CheckpointError as error:
            raise error.within(self.file, name) from error


def round_layer(
    checkpoint: Checkpoint, name: str, override: ScaleOverride, *, numerics: Numerics, device: torch.device
) -> QuantLinear:
    """A float layer of a checkpoint as a quantized one: its stored weight rounded to nearest, the override's scales.

    Raises:
        CheckpointError: the weight is not finite, or the layer leaves the integer arithmetic's range.
    """
    # Not at the top: the package of `quantize` imports the loader, which imports this module.
    from bytelane.quantize.rounding import round_to_nearest

    scheme = override.scheme()
    try:
        codes, scale = round_to_nearest(checkpoint.read_plain(f"{name}.weight"), scheme.weight)
        bias = checkpoint.read_plain(f"{name}.bias") if f"{name}.bias" in checkpoint.plain else None
        return QuantLinear(
            pack_rows(codes, scheme.weight.num_bits).to(device),
            scale.to(device),
            in_features=codes.shape[1],
            num_bits=scheme.weight.num_bits,
            input_scale=override.input_scale,
            output_scale=override.output_scale,
            bias=None if bias is None else bias.to(device),
            numerics=numerics,
        )
    except CheckpointError as error:
        raise error.within(checkpoint.file_of(f"{name}.weight"), name) from error


def missing_sides(checkpoint: Checkpoint, resolved: Mapping[str, ScaleOverride]) -> dict[str, list[str]]:
    """The quantized linear layers with a side in float, and which sides: `{"lm_head": ["input", "output"]}`."""
    found: dict[str, list[str]] = {}
    for name, module in checkpoint.modules.items():
        if module.kind is not Kind.LINEAR:
            continue
        scales = checkpoint.read_scales(name)
        sides = resolved.get(name, ScaleOverride()).sides(scales.input_scale, scales.output_scale)
        bare = [side for side, scale in zip(("input", "output"), sides, strict=True) if scale is None]
        if bare:
            found[name] = bare
    return found
