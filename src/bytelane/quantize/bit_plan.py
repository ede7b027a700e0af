r"""A plan: every layer's width, granularity and sides in a file that a person reads and edits.

    {
      "plan": 1,
      "model": "LlamaForCausalLM",
      "budget": {"size": 60000000},
      "recipe": {"embeddings": 8, "equalize": true, "range": {"method": "mse"}},
      "other_bytes": 81408,
      "layers": [
        {"name": "model.embed_tokens", "kind": "embedding", "shape": [49152, 576], "bits": 6, ...},
        {"name": "model.layers.0.self_attn.q_proj", "kind": "linear", "shape": [576, 576], "bits": 4,
         "granularity": "channel", "input": true, "output": true, "together": "model.layers.0.self_attn.q_proj",
         "bytes": 168208, "loss": 0.0021, "losses": {"2": 0.19, "3": 0.011, "4": 0.0021, "8": 1e-05}},
        ...
      ]
    }

A layer has one line. Its `bits` is a width, or null for a layer left in float. `together` names the first of the layers
that read the same tensor: they keep one width and one granularity, which runtimes that merge them need (take the entry
out of a layer that need not). `losses` is what each width was measured to cost, in nats a token; `bytes` and `loss`
follow from the rest and are worked out anew whenever a file is read, so an edit need not touch them. `recipe` is what
the losses were measured under; together with the layers it says everything that `bytelane quantize --plan` needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bytelane.errors import QuantizeError
from bytelane.quantize.plan import make_plan
from bytelane.quantize.recipe import GEMMA_BITS, Bits, Granularity, Recipe
from bytelane.scheme import row_bytes

VERSION: Final = 1

_HEADER = 110
"""Bytes that a tensor takes in a safetensors header beside its name, at most."""


class PlanError(QuantizeError):
    """A plan file that cannot be used, with the file, the layer and the rule."""


class PlannedLayer(BaseModel):
    """One quantized module.

    Attributes:
        name: the module's.
        kind: `"linear"`, `"embedding"`, or `"head"`: an output head with integer weights and both sides in float.
        shape: `(out, in)` of the weight.
        bits: its width; None leaves it in float.
        granularity: of its scales, `"channel"` or a group size.
        input: whether its input is quantized.
        output: whether its output is.
        together: the first of the layers that have one width and granularity with it, or None.
        tied: the head that shares this table's codes, or None.
        bias: whether it has one.
        losses: what each width was measured to cost, in nats a token; empty where the width was given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["linear", "embedding", "head"]
    shape: tuple[int, int]
    bits: Bits | None
    granularity: Granularity = "channel"
    input: bool = False
    output: bool = False
    together: str | None = None
    tied: str | None = None
    bias: bool = False
    losses: Mapping[int, float] = Field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return 1 if isinstance(self.granularity, str) else self.shape[1] // self.granularity

    @property
    def weights(self) -> int:
        """How many."""
        return self.shape[0] * self.shape[1]

    @property
    def loss(self) -> float | None:
        """What its width was measured to cost; 0 for a layer in float, None where nothing was measured."""
        return 0.0 if self.bits is None else self.losses.get(self.bits)

    def bytes_at(self, bits: int | None, storage: str, dtype: torch.dtype = torch.bfloat16) -> int:
        """What its tensors and their entries in a file's header take, at a width."""
        rows, columns = self.shape
        bias = rows * dtype.itemsize + len(self.name) + _HEADER if self.bias else 0
        if bits is None:
            return self.weights * dtype.itemsize + len(self.name) + _HEADER + bias
        packed = storage == "compressed-tensors" and (bits < 8 or self.kind == "embedding")
        codes = rows * 4 * -(-columns * bits // 32) + 16 if packed else rows * row_bytes(columns, bits)
        sides = 0 if self.kind == "embedding" else 2 if storage == "gemma" else self.input + self.output
        tensors = 2 + packed + sides
        return codes + 4 * (rows * self.groups + sides) + bias + tensors * (len(self.name) + _HEADER)


class BitPlan(BaseModel):
    """A plan for one model.

    Attributes:
        plan: the version of the format.
        model: the model's class, for people.
        budget: what the widths were chosen under: one of `size` (bytes), `average_bits` and `loss` (nats a token).
        recipe: everything that is not in `layers`.
        other_bytes: of the checkpoint's tensors that belong to no layer of the plan, headers included.
        layers: the quantized modules in the model's order, a tied head not among them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Literal[1]
    model: str
    budget: Mapping[str, float] = Field(default_factory=dict)
    recipe: Mapping[str, Any] = Field(default_factory=dict)
    other_bytes: int = Field(default=0, ge=0)
    layers: tuple[PlannedLayer, ...]

    @property
    def storage(self) -> str:
        """How the checkpoint will be written."""
        return str(self.recipe.get("storage", "compressed-tensors"))

    def layer_bytes(self, layer: PlannedLayer) -> int:
        """A layer's share of the checkpoint."""
        return layer.bytes_at(layer.bits, self.storage)

    @property
    def bytes(self) -> int:
        """Of the checkpoint's safetensors files, at most."""
        return self.other_bytes + sum(self.layer_bytes(layer) for layer in self.layers)

    @property
    def average_bits(self) -> float:
        """Of a quantized weight, scales not counted."""
        quantized = [x for x in self.layers if x.bits is not None]
        return sum((x.bits or 0) * x.weights for x in quantized) / max(1, sum(x.weights for x in quantized))

    @property
    def by_bits(self) -> dict[int | str, int]:
        """How many layers have each width, `"float"` last."""
        widths = [x.bits for x in self.layers]
        found: dict[int | str, int] = {b: widths.count(b) for b in sorted({b for b in widths if b is not None})}
        return found | ({"float": widths.count(None)} if None in widths else {})

    @property
    def loss(self) -> float:
        """The measured losses of all layers that have one, together: nats a token more than in float."""
        return sum(layer.loss or 0.0 for layer in self.layers)

    @classmethod
    def load(cls, file: Path | str) -> BitPlan:
        """Read and check a plan.

        Raises:
            PlanError: no such file, not a plan, or a layer that breaks a rule.
        """
        path = Path(file)
        if not path.is_file():
            raise PlanError(f"{path}: no such file")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"{path}: not JSON: {error}") from error
        if not is_plan(values):
            raise PlanError(f'{path}: no plan; one is a JSON object with "plan": {VERSION}')
        for layer in values["layers"] if isinstance(values.get("layers"), list) else ():
            if isinstance(layer, dict):  # what follows from the rest
                layer.pop("bytes", None)
                layer.pop("loss", None)
        try:
            found = cls.model_validate(values)
            Recipe.of(found.recipe, f"{path}: recipe")
        except ValidationError as error:
            raise PlanError(f"{path}: " + "; ".join(_explain(p, values) for p in error.errors())) from error
        _check(found, str(path))
        return found

    def save(self, file: Path | str) -> None:
        """Write the plan, one layer a line: all of it, or the file stays as it was."""
        path = Path(file)
        head = self.model_dump(mode="json", exclude={"layers"})
        text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "layers": [\n  '
        text += ",\n  ".join(json.dumps(self.line(layer)) for layer in self.layers) + "\n ]\n}\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def line(self, layer: PlannedLayer) -> dict[str, Any]:
        """A layer as it stands in the file: what is as usual left out."""
        values = layer.model_dump(mode="json", exclude_defaults=True)
        values |= {"granularity": layer.granularity, "bytes": self.layer_bytes(layer)}
        values.pop("losses", None)
        if layer.loss is not None:
            values["loss"] = layer.loss
        if layer.losses:
            values["losses"] = {str(bits): loss for bits, loss in layer.losses.items()}
        return values

    def to_recipe(self, recipe: Recipe | None = None) -> Recipe:
        """A recipe that does what the plan says.

        Args:
            recipe: for what the plan leaves open (ranges, rounding, folding, storage); the plan's own by default.
        """
        base = Recipe.of(self.recipe) if recipe is None else recipe
        sided = [x for x in self.layers if x.kind == "linear" and x.bits is not None]
        quantized, plain = ([x for x in self.layers if (x.bits is None) is none] for none in (False, True))
        return Recipe.of(
            base.model_dump(mode="json")
            | {
                "bits": _patterns((n, x.bits) for x in quantized for n in (x.name, x.tied) if n),
                "granularity": _patterns((n, x.granularity) for x in quantized for n in (x.name, x.tied) if n),
                "ignore": [*base.ignore, *_patterns((n, None) for x in plain for n in (x.name, x.tied) if n)],
                "no_input": [*_patterns((x.name, None) for x in sided if not x.input)],
                "no_output": [*_patterns((x.name, None) for x in sided if not x.output)],
            }
        )

    def check_source(self, source: Path, gguf_file: str | None = None, file: Path | str = "the plan") -> None:
        """`check_model` on a float checkpoint's configuration, before its weights are read.

        Args:
            source: a folder or a GGUF file: see `load_float_model`, which says what is wrong with a source.
            gguf_file: the GGUF file in the folder.
            file: the plan's file, named in errors.
        """
        if source.suffix == ".gguf" and gguf_file is None:
            source, gguf_file = source.parent, source.name
        extra = {} if gguf_file is None else {"gguf_file": gguf_file}
        if (source / (gguf_file or "config.json")).is_file():
            with torch.device("meta"):
                self.check_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **extra)), file)

    def check_model(self, model: nn.Module, file: Path | str = "the plan") -> None:
        """Refuse a model that the plan is not of.

        Raises:
            PlanError: a layer that the model has not, or of another shape, or one of the model's that is missing.
        """
        named = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        for layer in self.layers:
            found = named.get(layer.name)
            if found is None:
                raise PlanError(f"{file}: {layer.name}: the model has no such linear layer or embedding table")
            if tuple(found.weight.shape) != layer.shape:
                raise PlanError(
                    f"{file}: {layer.name}: the model's weight has the shape {tuple(found.weight.shape)}, "
                    f"the plan's {layer.shape}"
                )
        held = {x.name for x in self.layers}
        base = Recipe.of(self.recipe)
        missing = [m.name for m in make_plan(model, base).modules if m.name not in held]
        if missing:
            raise PlanError(
                f'{file}: {missing[0]}: not in the plan, which has to name every layer; add it, with "bits": null to '
                f"leave it in float"
            )


def is_plan(values: object) -> bool:
    """Whether parsed JSON is meant as a plan."""
    return isinstance(values, dict) and values.get("plan") == VERSION


def _patterns(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """One anchored pattern for each distinct value, of exactly its names."""
    names: dict[Any, list[str]] = {}
    for name, value in pairs:
        names.setdefault(value, []).append(re.escape(name))
    return {f"^(?:{'|'.join(found)})$": value for value, found in names.items()}


def _explain(problem: Any, values: dict[str, Any]) -> str:
    """One of pydantic's problems, with the layer's name for its number."""
    at = list(problem["loc"])
    if len(at) > 1 and at[0] == "layers":
        layer = values["layers"][at[1]]
        at[:2] = [layer["name"] if isinstance(layer, dict) and "name" in layer else f"layer {at[1]}"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "no such entry"
    return f"{'.'.join(str(part) for part in at)}: {message}"


def _check(plan: BitPlan, file: str) -> None:
    """The rules between a layer's entries, and between layers."""
    by_name = {layer.name: layer for layer in plan.layers}
    if not plan.layers or len(by_name) != len(plan.layers):
        twice = sorted({x.name for x in plan.layers if by_name[x.name] is not x})
        raise PlanError(f"{file}: {twice[0]}: there twice" if twice else f"{file}: no layer")
    for layer in plan.layers:
        rule = _broken(layer, plan.storage, by_name)
        if rule is not None:
            raise PlanError(f"{file}: {layer.name}: {rule}")


def _broken(layer: PlannedLayer, storage: str, layers: Mapping[str, PlannedLayer]) -> str | None:
    """The rule that a layer breaks, and what to do."""
    if min(layer.shape) < 1:
        return f"a shape has positive sizes, found {layer.shape}"
    if isinstance(layer.granularity, int) and layer.shape[1] % layer.granularity:
        return f"the group size {layer.granularity} does not divide the {layer.shape[1]} inputs"
    if storage == "gemma" and layer.bits not in (None, *GEMMA_BITS):
        return f"the gemma storage holds 2, 4 and 8 bits, found {layer.bits}"
    if storage == "gemma" and layer.kind != "embedding" and layer.granularity != "channel":
        return "the gemma storage holds one scale for each channel of a linear layer"
    if layer.kind != "linear" and (layer.input or layer.output):
        why = "a table has no sides" if layer.kind == "embedding" else 'a head has sides with "head": "full"'
        return f'{why}; set "input" and "output" to false'
    if layer.together is not None:
        first = layers.get(layer.together)
        if first is None:
            return f'"together" names {layer.together}, which is not in the plan'
        if (first.bits, first.granularity) != (layer.bits, layer.granularity):
            return (
                f"{layer.bits} bits, {layer.granularity}, where {first.name}, which reads the same tensor, has "
                f'{first.bits} bits, {first.granularity}; give both the same, or take "together" out'
            )
    return None
