"""A recipe meets a model: which module is quantized how, decided and checked before any text is read.

Candidates are every `nn.Linear` and, where the recipe quantizes them, every `nn.Embedding`. The output head follows the
recipe's `head`. A tied head (its weight is the embedding's parameter) is stored once where that says the same thing
twice: both in float, or both weight-only with the same width and granularity. Otherwise both are written and the model
is untied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from bytelane.checkpoint.types import QuantizedModule
from bytelane.errors import CheckpointError, ConfigError
from bytelane.quantize.recipe import Head, Range, Recipe, RecipeError
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme, check_in_features

V = TypeVar("V")


@dataclass(frozen=True)
class Plan:
    """What is quantized, what is not, and where.

    Attributes:
        modules: the quantized modules in the model's order, a tied head not among them.
        unquantized: the linear and embedding modules left in float.
        tied: a head that shares the quantized embedding's codes, to the embedding.
        untied: heads that share the float model's embedding and get a weight of their own in the checkpoint.
        float_tied: a head and its embedding are both in float and stay tied.
        input_ranges: the range method of every quantized input.
        output_ranges: the range method of every quantized output.
    """

    modules: tuple[QuantizedModule, ...]
    unquantized: tuple[str, ...]
    tied: Mapping[str, str]
    untied: tuple[str, ...]
    float_tied: bool
    input_ranges: Mapping[str, Range]
    output_ranges: Mapping[str, Range]

    @property
    def observed(self) -> tuple[str, ...]:
        """The linear layers with a quantized side."""
        return tuple(m.name for m in self.modules if m.name in self.input_ranges or m.name in self.output_ranges)


def _first(patterns: Mapping[str, V], name: str, default: V) -> V:
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), default)


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str], *, ordered: bool) -> None:
    """Refuse a pattern that matches no module, or only modules that earlier patterns of the map have decided."""
    taken: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if re.search(pattern, name)}
        if not found:
            raise RecipeError(
                f"{key}: the pattern {pattern!r} matches none of the {len(names)} modules it could apply to"
                + (f" (such as {names[0]} and {names[-1]})" if names else "")
                + "; correct or remove it"
            )
        if ordered and found <= taken:
            raise RecipeError(
                f"{key}: the pattern {pattern!r} decides nothing, earlier patterns match all of its modules first; "
                f"move it up or remove it"
            )
        taken |= found


def _head_name(model: Any, modules: Mapping[str, nn.Module]) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return next((name for name, module in modules.items() if module is head), None) if head is not None else None


def _storage(recipe: Recipe, num_bits: int) -> Storage:
    if recipe.storage == "gemma":
        return Storage.GEMMA
    return Storage.INT_QUANTIZED if num_bits == 8 else Storage.PACK_QUANTIZED


def _weight_scheme(recipe: Recipe, name: str, shape: tuple[int, int], default_bits: int) -> WeightScheme:
    size = _first(recipe.granularity, name, "channel")
    scheme = WeightScheme(_first(recipe.bits, name, default_bits), size if isinstance(size, int) else None)
    try:
        scheme.groups(shape[1])
    except CheckpointError as error:
        raise error.within(None, name) from error
    return scheme


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Decide every module.

    Args:
        model: a transformers model, or any module; its weights are not read.
        recipe: what to do.

    Raises:
        RecipeError: a pattern decides nothing, or nothing is left to quantize.
        CheckpointError: a layer's shape does not fit the scheme (group size, length of the dot product), or two
            quantized modules share a weight other than a head's and an embedding's.
    """
    named: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    linears = [n for n, m in named.items() if isinstance(m, nn.Linear)]
    head = _head_name(model, named)
    wanted = [n for n in named if n in linears or recipe.embeddings is not None]
    if recipe.head is Head.FLOAT:
        wanted = [n for n in wanted if n != head]
    _check_patterns("ignore", recipe.ignore, wanted, ordered=False)
    chosen = [n for n in wanted if not _matches(recipe.ignore, n)]
    if not chosen:
        raise RecipeError("the recipe quantizes nothing: every linear layer is ignored; remove some `ignore` pattern")
    sided = [n for n in chosen if n in linears and not (n == head and recipe.head is Head.WEIGHTS)]
    inputs = [n for n in sided if not _matches(recipe.no_input, n)]
    outputs = [n for n in sided if not _matches(recipe.no_output, n)]
    _check_patterns("bits", [*recipe.bits], chosen, ordered=True)
    _check_patterns("granularity", [*recipe.granularity], chosen, ordered=True)
    _check_patterns("no_input", recipe.no_input, sided, ordered=False)
    _check_patterns("no_output", recipe.no_output, sided, ordered=False)
    _check_patterns("input_ranges", [*recipe.input_ranges], inputs, ordered=True)
    _check_patterns("output_ranges", [*recipe.output_ranges], outputs, ordered=True)

    modules: dict[str, QuantizedModule] = {}
    for name in chosen:
        modules[name] = _describe(recipe, name, named[name], name in inputs, name in outputs)
    owner: dict[int, str] = {}
    tied: dict[str, str] = {}
    untied: list[str] = []
    float_tied = False
    for name, module in named.items():
        first = owner.setdefault(id(module.weight), name)
        if first == name:
            continue
        if name != head:
            raise ConfigError(f"shares its weight with {first}; only an output head may share a weight", tensor=name)
        if name not in modules and first not in modules:
            float_tied = True
        elif name in modules and first in modules and _same(modules[first], modules[name]):
            tied[name] = first
            del modules[name]
        else:
            untied.append(name)
    return Plan(
        modules=tuple(modules.values()),
        unquantized=tuple(n for n in named if n not in modules and n not in tied),
        tied=tied,
        untied=tuple(untied),
        float_tied=float_tied,
        input_ranges={n: _first(recipe.input_ranges, n, recipe.range) for n in inputs},
        output_ranges={n: _first(recipe.output_ranges, n, recipe.range) for n in outputs},
    )


def _same(embedding: QuantizedModule, head: QuantizedModule) -> bool:
    """Whether a head is nothing but its embedding's codes once more."""
    scheme = head.scheme
    weight_only = isinstance(scheme, LinearScheme) and not scheme.quantize_input and not scheme.quantize_output
    return weight_only and not head.bias and embedding.scheme.weight == scheme.weight


def _describe(recipe: Recipe, name: str, module: nn.Module, has_input: bool, has_output: bool) -> QuantizedModule:
    rows, columns = (int(size) for size in module.weight.shape)  # type: ignore[union-attr]
    linear = isinstance(module, nn.Linear)
    default = recipe.default_bits if linear or recipe.embeddings is None else recipe.embeddings
    weight = _weight_scheme(recipe, name, (rows, columns), default)
    if linear:
        try:
            check_in_features(columns)
        except CheckpointError as error:
            raise error.within(None, name) from error
    return QuantizedModule(
        name=name,
        kind=Kind.LINEAR if linear else Kind.EMBEDDING,
        shape=(rows, columns),
        scheme=LinearScheme(weight, has_input, has_output) if linear else EmbeddingScheme(weight),
        storage=_storage(recipe, weight.num_bits),
        bias=linear and module.bias is not None,
    )
