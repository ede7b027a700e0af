"""Where the tensors of a checkpoint should lie, as its configuration and the model say, before the files are asked.

A storage (`compressed`, `gemma`) turns a configuration and a model skeleton into a `Layout`: one `ModuleLayout` for
each quantized module, with the name of the tensor that plays each role. `reader` then holds the layout against the
files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bytelane.scheme import Kind, Storage

LEGACY_BUFFERS = (r"(^|\.)rotary_emb\.inv_freq$",)
"""Tensors that old checkpoints hold and every model computes for itself."""


@dataclass(frozen=True)
class ModuleLayout:
    """One quantized module as the configuration describes it.

    Attributes:
        name: the module's name.
        kind: linear or embedding.
        shape: `(out_features, in_features)` of the dense weight, from the model.
        num_bits: N.
        group_size: inputs that share a scale; None for one scale a row, or where the scale's own shape decides.
        storage: how the codes lie.
        weight: name of the codes' tensor.
        scale: name of the weight scales' tensor.
        weight_shape: name of the tensor that repeats the shape, or None.
        input_scale: name of the static input scale, or None when the configuration leaves the side unquantized.
        output_scale: likewise.
        optional_activations: an absent activation scale means "not calibrated" instead of being an error.
        groups_from_scale: the scale's second dimension, not the configuration, says how many groups there are.
        bias: name of the bias, or None.
        other_bits: the width by another reading of an ambiguous configuration, or None; the stored codes decide.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    num_bits: int
    group_size: int | None
    storage: Storage
    weight: str
    scale: str
    weight_shape: str | None = None
    input_scale: str | None = None
    output_scale: str | None = None
    optional_activations: bool = False
    groups_from_scale: bool = False
    bias: str | None = None
    other_bits: int | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors the module may have."""
        roles = (self.weight, self.scale, self.weight_shape, self.input_scale, self.output_scale, self.bias)
        return tuple(name for name in roles if name is not None)

    @property
    def replaced(self) -> tuple[str, str]:
        """The names of the dense module's own parameters, which the tensors of the quantized one stand for."""
        return f"{self.name}.weight", f"{self.name}.bias"


@dataclass(frozen=True)
class Layout:
    """What a configuration says about a checkpoint.

    Attributes:
        modules: the quantized modules, in the model's order.
        kv_leaves: the last parts of the key and value scales' names, or None where the configuration has none.
        kv_required: at least one attention module must have KV-cache scales.
    """

    modules: tuple[ModuleLayout, ...]
    kv_leaves: tuple[str, str] | None
    kv_required: bool = False


@dataclass(frozen=True)
class Skeleton:
    """The facts a model without weights tells about its checkpoint.

    Attributes:
        model: the model.
        quantizable: its linear and embedding modules by name, in order.
        modules: the names of all its modules.
        tensors: parameters and persistent buffers by name; meta tensors give dtype and shape.
        buffers: the names among them that are buffers.
        tied: parameters that are another one: name to name.
        ignored: patterns of tensors a checkpoint may hold though the model does not take them.
        optional: patterns of buffers a checkpoint may leave out.
    """

    model: nn.Module
    quantizable: Mapping[str, nn.Linear | nn.Embedding]
    modules: frozenset[str]
    tensors: Mapping[str, Tensor]
    buffers: frozenset[str]
    tied: Mapping[str, str]
    ignored: tuple[re.Pattern[str], ...] = field(default=())
    optional: tuple[re.Pattern[str], ...] = field(default=())

    @classmethod
    def of(cls, model: nn.Module) -> Skeleton:
        """Collect the facts of a transformers model (or any module)."""
        named = dict(model.named_modules())
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        return cls(
            model=model,
            quantizable={n: m for n, m in named.items() if isinstance(m, (nn.Linear, nn.Embedding))},
            modules=frozenset(named),
            tensors=tensors,
            buffers=frozenset(name for name, _ in model.named_buffers() if name in tensors),
            tied={str(k): str(v) for k, v in tied.items() if k in tensors and v in tensors},
            ignored=_patterns(model, "_keys_to_ignore_on_load_unexpected", LEGACY_BUFFERS),
            optional=_patterns(model, "_keys_to_ignore_on_load_missing"),
        )

    def tied_modules(self) -> dict[str, str]:
        """Modules whose weight is another module's: name to name."""
        pairs = ((k.rpartition("."), v.rpartition(".")) for k, v in self.tied.items())
        return {k[0]: v[0] for k, v in pairs if k[2] == v[2] == "weight"}

    def kind(self, name: str) -> Kind:
        """What sort of module a quantizable one is."""
        return Kind.LINEAR if isinstance(self.quantizable[name], nn.Linear) else Kind.EMBEDDING

    def shape(self, name: str) -> tuple[int, int]:
        """The dense weight's shape of a quantizable module."""
        rows, columns = self.quantizable[name].weight.shape
        return rows, columns

    def bias(self, name: str) -> str | None:
        """The name of a quantizable module's bias, if it has one."""
        return f"{name}.bias" if isinstance(getattr(self.quantizable[name], "bias", None), torch.Tensor) else None


def _patterns(model: nn.Module, attribute: str, more: Iterable[str] = ()) -> tuple[re.Pattern[str], ...]:
    """The patterns a model class keeps under an attribute (a list, a set or None)."""
    found: Iterable[str] = getattr(model, attribute, None) or ()
    return tuple(re.compile(pattern) for pattern in (*sorted(found), *more))
