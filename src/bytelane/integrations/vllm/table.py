"""Which modules of a checkpoint are quantized, and how: asked by name, answered from configuration and file headers.

vLLM builds its own model, so there is no transformers model to hold the checkpoint against. Its layers ask for their
parts by name instead. The answer comes from the same readers of the configuration that `bytelane.checkpoint` uses, on a
model of the one module asked for, and the headers of the files say what else must be known: which modules have codes at
all, how wide an ambiguous pattern is, which embedding table an unnamed layer means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bytelane.checkpoint import compressed, gemma
from bytelane.checkpoint.layout import ModuleLayout, Skeleton
from bytelane.errors import ConfigError, GroupSizeError, MissingTensorError
from bytelane.packing import stored_shape
from bytelane.scheme import Kind

SCALE_LEAVES = ("weight_scale", "embedding_scale")
"""Every quantized module has one of these."""

_EMBEDDING_NAMES = ("embed_tokens", "word_embeddings", "wte", "tok_embeddings", "embeddings", "embedding")

_TOWERS = ("vision", "audio")

TEXT_ONLY = """--hf-overrides '{"architectures": ["Gemma4ForCausalLM"]}'"""
"""The option of vLLM's that serves the text half of a multimodal Gemma 4."""


@dataclass(frozen=True)
class Header:
    """A stored tensor without its data: its safetensors dtype and its shape."""

    dtype: str
    shape: tuple[int, ...]


def serves(raw: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of this scheme: Gemma's own, or one that quantizes outputs to static int8.

    The output side is what no other scheme has. A checkpoint without it (weights alone, or weights and inputs) is
    served by vLLM's own kernels.
    """
    if raw.get("quant_method") == gemma.METHOD:
        return True
    groups = raw.get("config_groups")
    return isinstance(groups, Mapping) and any(_integer_output(group) for group in groups.values())


def _integer_output(group: Any) -> bool:
    outputs = group.get("output_activations") if isinstance(group, Mapping) else None
    return isinstance(outputs, Mapping) and str(outputs.get("type", "int")).lower() == "int"


def integer_groups(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config groups with integer weights; float ones (fp8 beside wNa8o8) stay vLLM's."""
    found = {}
    for name, group in raw["config_groups"].items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or str(weights.get("type", "int")).lower() == "int":
            found[name] = group
    return found


class ModuleTable:
    """The quantized modules of one checkpoint.

    Args:
        raw: the `quantization_config`.
        source: the model's folder or hub id, named in errors.
    """

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.source = Path(source)
        self.gemma = raw.get("quant_method") == gemma.METHOD
        self._raw = dict(raw) if self.gemma else {**raw, "config_groups": integer_groups(raw)}
        if self.gemma:
            # Which modules are left out is read off the headers, as transformers would need its own model to say it.
            self._raw["modules_to_not_convert"] = []
        else:
            # vLLM writes the numbers of heads into the dictionary it hands over.
            self._raw = {k: v for k, v in self._raw.items() if not k.startswith("total_num_")}
            compressed.parse_config(self._raw, self._file)
        self.headers: dict[str, Header] = {}
        self._names: dict[str, str] = {}

    @property
    def _file(self) -> Path:
        return self.source / "config.json"

    def read_headers(self, headers: Mapping[str, Header]) -> None:
        """Take the names, dtypes and shapes of the stored tensors."""
        self.headers = dict(headers)
        self._names = {name: name for name in self._modules()}

    def rename(self, mapped: Callable[[str], str | None]) -> None:
        """Follow the names vLLM's model class gives the modules."""
        for name in self._modules():
            # Mappings are of tensors, and some match a dot at the end.
            found = mapped(f"{name}.weight")
            if found is not None:
                self._names[found.rpartition(".")[0]] = name

    def _modules(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self.headers}

    def _owners(self) -> Iterable[str]:
        split = (name.rpartition(".") for name in self.headers)
        return (owner for owner, _, leaf in split if leaf in SCALE_LEAVES)

    def stored_name(self, name: str) -> str | None:
        """The checkpoint's name of a module that vLLM calls `name`; None when it has no tensor of such a module.

        vLLM's text-only classes read the text half of a multimodal checkpoint and drop a part of the names that no
        mapping announces; a name that ends like exactly one module outside the towers is that module.
        """
        found = self._names.get(name)
        if found is not None or not name:
            return found
        tail = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        ends = {n for n in self._owners() if n == tail or n.endswith(f".{tail}")}
        ends = {n for n in ends if not any(tower in n for tower in _TOWERS)}
        return ends.pop() if len(ends) == 1 else None

    def embedding_name(self, rows: int) -> str | None:
        """The quantized input embedding, for layers that vLLM builds without a name: the only table of `rows` rows.

        Raises:
            ConfigError: several tables fit.
        """
        fitting = [
            name
            for name in self._owners()
            if name.rpartition(".")[2] in _EMBEDDING_NAMES and self._scale_header(name).shape[:1] == (rows,)
        ]
        if len(fitting) > 1:
            raise ConfigError(
                f"vLLM gives this layer no name, and {', '.join(fitting)} all have {rows} rows",
                file=self.source,
                tensor="embedding",
            )
        return fitting[0] if fitting else None

    def is_quantized(self, name: str) -> bool:
        """Whether the checkpoint has scales of a module."""
        return any(f"{name}.{leaf}" in self.headers for leaf in SCALE_LEAVES)

    def rows(self, name: str) -> int | None:
        """The output features of a quantized module, by its scales; None when it is not quantized."""
        shape = self._scale_header(name).shape if self.is_quantized(name) else ()
        return shape[0] if shape else None

    def _scale_header(self, name: str) -> Header:
        return next(self.headers[f"{name}.{leaf}"] for leaf in SCALE_LEAVES if f"{name}.{leaf}" in self.headers)

    def layout(self, name: str, kind: Kind, shape: tuple[int, int], *, bias: bool = False) -> ModuleLayout | None:
        """How a module is stored, with its width and group size settled; None when it is not quantized by this scheme.

        Args:
            name: the checkpoint's name of it.
            kind: linear or embedding.
            shape: `(out_features, in_features)` of all ranks together.
            bias: whether it has one.

        Raises:
            ConfigError: or the subclass that names the rule.
            MissingTensorError: the configuration says it is quantized, and the files have no codes of it.
        """
        owned = f"{name}.{'weight_scale' if kind is Kind.LINEAR else 'embedding_scale'}"
        if self.gemma and owned not in self.headers:
            return None
        rows, columns = shape
        module = (
            nn.Linear(columns, rows, bias=bias, device="meta")
            if kind is Kind.LINEAR
            else nn.Embedding(rows, columns, device="meta")
        )
        skeleton = Skeleton(
            model=nn.Identity(),
            quantizable={name: module},
            modules=frozenset({name}),
            tensors={},
            buffers=frozenset(),
            tied={},
        )
        raw = {**self._raw, "quantize_embeddings": True} if self.gemma else self._raw
        describe = gemma.describe if self.gemma else compressed.describe
        found = describe(raw, skeleton, frozenset(), self._file).modules
        if not found:
            return None
        layout = self._settled(found[0])
        for tensor in (layout.weight, layout.scale):
            if tensor not in self.headers:
                raise MissingTensorError(
                    "the configuration quantizes this module, and the checkpoint does not have it",
                    file=self.source,
                    tensor=tensor,
                )
        return self._grouped(layout)

    def _settled(self, layout: ModuleLayout) -> ModuleLayout:
        """The width of the stored codes, where the configuration can be read two ways."""
        header = self.headers.get(layout.weight)
        if layout.other_bits is None or header is None:
            return layout
        other = replace(layout, num_bits=layout.other_bits, other_bits=None)
        return other if header.shape in stored_shape(*other.shape, other.num_bits, other.storage) else layout

    def _grouped(self, layout: ModuleLayout) -> ModuleLayout:
        """The group size as the scales have it; None for one scale a row."""
        columns, size = layout.shape[1], layout.group_size
        if layout.groups_from_scale:
            shape = self.headers[layout.scale].shape
            if len(shape) != 2 or not shape[1] or columns % shape[1]:
                raise GroupSizeError(
                    f"must be [{layout.shape[0]}, groups] with groups that divide {columns}, found {list(shape)}",
                    file=self.source,
                    tensor=layout.scale,
                )
            size = columns // shape[1]
        elif size is not None and columns % size:
            raise GroupSizeError(
                f"the group size {size} does not divide the {columns} input features",
                file=self.source,
                tensor=layout.name,
            )
        return replace(layout, group_size=None if size == columns else size)

    def biases(self) -> list[str]:
        """The quantized modules that have a bias."""
        return [owner for owner in self._owners() if f"{owner}.bias" in self.headers]
