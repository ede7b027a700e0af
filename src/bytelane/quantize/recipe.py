r"""What to do with a float model: a recipe, checked before any model is loaded.

A recipe is a small JSON file, or the same values from a command line. Modules are chosen by patterns: regular
expressions found anywhere in the module's name (`re.search`). In an ordered map the first matching pattern wins, so the
particular goes before the general:

    {
      "default_bits": 8,
      "bits": {"mlp\\.down_proj$": 8, "mlp\\.": 4},
      "granularity": {"mlp\\.": 32},
      "no_output": ["layers\\.(11|28)\\.mlp\\.down_proj$"],
      "input_ranges": {"": {"method": "percentile", "percentile": 99.999}}
    }

A linear layer that static ranges would hurt is spared in three steps, the mildest first: `no_output` leaves its output
in float (it still computes in integers), `no_input` leaves its input in float (integer weights, float arithmetic),
`ignore` leaves the whole layer in float. A pattern that decides nothing is refused when the recipe meets the model: see
`bytelane.quantize.plan`.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bytelane.errors import QuantizeError
from bytelane.scheme import MAX_BITS, MIN_BITS

GEMMA_BITS = (2, 4, 8)


class RecipeError(QuantizeError):
    """A recipe that cannot be carried out, with what to change."""


class Head(enum.Enum):
    """How the output head is treated."""

    WEIGHTS = "weights"
    """Integer weights, both activation sides in float, as Gemma's."""
    FULL = "full"
    """Like any other linear layer."""
    FLOAT = "float"
    """Left alone."""


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from error
    return value


def _bits(value: int) -> int:
    if not MIN_BITS <= value <= MAX_BITS:
        raise ValueError(f"weights have {MIN_BITS} to {MAX_BITS} bits, found {value}")
    return value


def _granularity(value: int | str) -> int | str:
    if value != "channel" and (isinstance(value, str) or value < 1):
        raise ValueError(f'a granularity is "channel" or a positive group size, found {value!r}')
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]
Bits = Annotated[int, Field(strict=True), AfterValidator(_bits)]
Granularity = Annotated[Annotated[int, Field(strict=True)] | str, AfterValidator(_granularity)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Frozen):
    """How an activation range follows from what was observed.

    Attributes:
        method: `"minmax"` covers everything seen; `"percentile"` clips the rest; `"mse"` has the least squared error of
            rounding and clipping together.
        percentile: the share of `|x|` to cover, in percent, below 100; for `"percentile"` only.
    """

    method: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.method != "percentile" and self.percentile is not None:
            raise ValueError('"percentile" goes with {"method": "percentile"}; remove it or change the method')
        if self.method == "percentile" and (self.percentile is None or not 50 <= self.percentile < 100):
            raise ValueError(
                f'{{"method": "percentile"}} needs a "percentile" from 50 to below 100, found {self.percentile}; '
                f'for all of the range use {{"method": "minmax"}}'
            )
        return self

    @property
    def label(self) -> str:
        """`"minmax"`, `"mse"` or `"percentile 99.99"`."""
        return self.method if self.percentile is None else f"percentile {self.percentile:g}"

    @property
    def needs_histogram(self) -> bool:
        """Whether the smallest and the largest value are not enough."""
        return self.method != "minmax"


class Recipe(_Frozen):
    """How a float model becomes a wNa8o8 checkpoint. Weight scales are float32.

    Attributes:
        default_bits: weight bits of linear layers that no pattern in `bits` matches.
        bits: ordered patterns to weight bits.
        granularity: ordered patterns to `"channel"` (one scale a row, also the default) or a group size.
        ignore: modules left in float.
        no_input: linear layers whose input is left in float.
        no_output: linear layers whose output is left in float.
        embeddings: bits of embedding tables that no pattern in `bits` matches; None leaves all tables in float.
        head: how the output head is treated.
        range: the range method of every activation that no pattern below matches.
        input_ranges: ordered patterns to the range method of inputs. Layers that share an input must agree.
        output_ranges: ordered patterns to the range method of outputs.
        storage: how the checkpoint is written.
        rotate: rotate the residual stream first (Llama-like models), which spreads massive activations over all
            channels and gives a tied head a weight of its own: see `bytelane.quantize.fold`.
        equalize: make the channels of activations and of weights equally wide first: see there.
        rounding: of the weights inside the decoder layers: to the nearest, or by GPTQ (`bytelane.quantize.gptq`).
            Other weights are rounded to the nearest.
        search: how many of the loudest activation tensors get their range by the model's loss
            (`bytelane.quantize.search`).
        learn_scales: steps of gradient descent on all scales of the decoder layers at once, by the model's loss, after
            everything else (`bytelane.quantize.learn`).
        kv_cache: observe static int8 scales of the attention's keys and values too, for runtimes with an int8 cache.
    """

    default_bits: Bits = 8
    bits: Mapping[Pattern, Bits] = Field(default_factory=dict)
    granularity: Mapping[Pattern, Granularity] = Field(default_factory=dict)
    ignore: tuple[Pattern, ...] = ()
    no_input: tuple[Pattern, ...] = ()
    no_output: tuple[Pattern, ...] = ()
    embeddings: Bits | None = None
    head: Head = Head.WEIGHTS
    range: Range = Range()
    input_ranges: Mapping[Pattern, Range] = Field(default_factory=dict)
    output_ranges: Mapping[Pattern, Range] = Field(default_factory=dict)
    storage: Literal["compressed-tensors", "gemma"] = "compressed-tensors"
    rotate: bool = False
    equalize: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    search: Annotated[int, Field(strict=True, ge=0)] = 0
    learn_scales: Annotated[int, Field(strict=True, ge=0)] = 0
    kv_cache: bool = False

    @model_validator(mode="after")
    def _check_storage(self) -> Recipe:
        if self.storage == "gemma":
            widths = {self.default_bits, *self.bits.values(), *([] if self.embeddings is None else [self.embeddings])}
            if not widths <= set(GEMMA_BITS):
                raise ValueError(
                    f"the gemma storage holds 2, 4 and 8 bits, found {sorted(widths - set(GEMMA_BITS))}; "
                    f'use those, or "storage": "compressed-tensors"'
                )
        return self

    @classmethod
    def of(cls, values: Mapping[str, object], where: str = "recipe") -> Recipe:
        """Build a recipe from plain values (a parsed file, command-line flags).

        Args:
            values: by field name; ordered maps may also be `["pattern=value", ...]`, as a command line gives them.
            where: the origin, named in errors.

        Raises:
            RecipeError: with every problem found.
        """
        maps = ("bits", "granularity", "input_ranges", "output_ranges")
        plain: dict[str, object] = {k: _from_flags(k, v) if k in maps else v for k, v in values.items()}
        if isinstance(plain.get("range"), str):
            plain["range"] = parse_range(str(plain["range"]))
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            raise RecipeError(_explain(error, where)) from error

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe from a JSON file, or one of the built-in recipes by its bare name.

        Raises:
            RecipeError: there is no such recipe, it is not JSON, or its values are wrong.
        """
        name = str(path)
        if name in builtin_recipes():
            text = files("bytelane.quantize").joinpath("recipes", f"{name}.json").read_text(encoding="utf-8")
        elif Path(path).is_file():
            text = Path(path).read_text(encoding="utf-8")
        else:
            raise RecipeError(f"{name}: no such file; the built-in recipes are {', '.join(builtin_recipes())}")
        try:
            values = json.loads(text, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{name}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"{name}: a recipe is a JSON object, found a {type(values).__name__}")
        return cls.of(values, name)

    def ranges(self, side: Literal["input", "output"]) -> Mapping[str, Range]:
        """The ordered range patterns of a side."""
        return self.input_ranges if side == "input" else self.output_ranges


def builtin_recipes() -> tuple[str, ...]:
    """The names of the recipes that come with the package."""
    folder = files("bytelane.quantize").joinpath("recipes")
    return tuple(sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json")))


def parse_range(text: str) -> Range:
    """`"minmax"`, `"mse"`, or a percentile such as `"99.99"`, as a `Range`.

    Raises:
        RecipeError: neither.
    """
    if text in ("minmax", "mse"):
        return Range.model_validate({"method": text})
    try:
        return Range(method="percentile", percentile=float(text))
    except ValueError as error:  # also pydantic's
        raise RecipeError(f'a range is "minmax", "mse" or a percentile from 50 to below 100, found {text!r}') from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecipeError(f"{twice!r} is given twice; only the first match counts, so remove one")
    return found


def _from_flags(key: str, value: object) -> object:
    """`["pattern=value", ...]` as an ordered map; a map passes through."""
    if not isinstance(value, (list, tuple)):
        return value
    pairs: list[tuple[str, object]] = []
    for item in value:
        pattern, found, setting = str(item).rpartition("=")
        if not found:
            raise RecipeError(f"{key}: {item!r} must be PATTERN=VALUE")
        if key.endswith("ranges"):
            pairs.append((pattern, parse_range(setting)))
        else:
            pairs.append((pattern, int(setting) if setting.isdecimal() else setting))
    return _unique_keys(pairs)


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: no such setting; there are {', '.join(Recipe.model_fields)}")
        else:
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
    return f"{where}: " + "; ".join(lines)
