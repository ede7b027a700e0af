"""Reading Gemma mobile configurations: which module has how many bits, and where its tensors lie.

Which modules are quantized at all is transformers' decision, asked of transformers itself: entries of
`modules_to_not_convert` match from the start up to a module boundary (as a name or a regular expression) or as a
suffix, and where the list is absent the output head and tied weights are left out. The width is the first pattern of
`module_quant_configs`, in order, that `re.search` finds in the name; else `num_bits`. transformers joins the patterns
into one alternation instead, of which the leftmost match in the name counts; where the two readings differ, the stored
tensor is one or the other, and says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from bytelane.checkpoint.expressions import check_ends, compiled
from bytelane.checkpoint.layout import Layout, ModuleLayout, Skeleton
from bytelane.errors import ConfigError, UnsupportedWidthError
from bytelane.scheme import Kind, Storage

METHOD = "gemma"
WIDTHS = (2, 4, 8)
KV_LEAVES = ("k_cache_scale", "v_cache_scale")
DEFAULT_BITS = 4
"""Width of unmatched modules where the configuration has no `num_bits`: transformers' default."""

_ROOT = "quantization_config"

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
"""What transformers puts behind an entry of `modules_to_not_convert`: an entry must compile, and end, with it."""


def _width(found: Any, key: str, file: Path) -> int:
    if isinstance(found, bool) or found not in WIDTHS:
        raise UnsupportedWidthError(f"Gemma storage has 2, 4 and 8 bits, found {found}", file=file, tensor=key)
    return int(found)


def _widths(raw: Mapping[str, Any], file: Path) -> list[tuple[re.Pattern[str], int]]:
    """The ordered patterns of `module_quant_configs` with their widths."""
    key = f"{_ROOT}.module_quant_configs"
    found = raw.get("module_quant_configs") or {}
    if not isinstance(found, dict):
        raise ConfigError(f"must be an object, found {type(found).__name__}", file=file, tensor=key)
    default = _width(raw.get("num_bits", DEFAULT_BITS), f"{_ROOT}.num_bits", file)
    widths = []
    for pattern, options in found.items():
        if not isinstance(options, dict) or set(options) - {"num_bits"}:
            raise ConfigError(f"must have num_bits and nothing else, found {options}", file=file, tensor=pattern)
        widths.append((compiled(pattern, key, file), _width(options.get("num_bits", default), pattern, file)))
    widths.append((re.compile(""), default))
    return widths


def _left_out(raw: Mapping[str, Any], skeleton: Skeleton, file: Path) -> list[str]:
    """The entries that transformers leaves out of the conversion."""
    key = f"{_ROOT}.modules_to_not_convert"
    entries = raw.get("modules_to_not_convert")
    if entries is not None and not (isinstance(entries, list) and all(isinstance(e, str) for e in entries)):
        raise ConfigError("must be a list of strings", file=file, tensor=key)
    wrapped = [f"(?:{entry}){_BOUNDARY}" for entry in entries or ()]
    for entry in wrapped:
        compiled(entry, key, file)
    check_ends(wrapped, skeleton.modules, key, file)
    keep = getattr(skeleton.model, "_keep_in_fp32_modules", None)
    return list(HfQuantizer.get_modules_to_not_convert(skeleton.model, entries, keep))


def describe(raw: Mapping[str, Any], skeleton: Skeleton, shared: frozenset[str], file: Path) -> Layout:
    """The layout a Gemma configuration gives a model.

    Args:
        raw: the `quantization_config`.
        skeleton: the model; a transformers model where `modules_to_not_convert` is absent.
        shared: modules that have no tensors of their own, being tied to another.
        file: named in errors.

    Raises:
        ConfigError: a value of the wrong type, or a pattern that does not compile.
        UnsupportedWidthError: a width other than 2, 4 and 8.
    """
    widths = _widths(raw, file)
    patterns = [pattern.pattern for pattern, _ in widths]
    check_ends(patterns, skeleton.quantizable, f"{_ROOT}.module_quant_configs", file)
    left_out = _left_out(raw, skeleton, file)
    embeddings = raw.get("quantize_embeddings", False)
    if not isinstance(embeddings, bool):
        raise ConfigError(f"must be a boolean, found {embeddings}", file=file, tensor=f"{_ROOT}.quantize_embeddings")
    modules = []
    for name in skeleton.quantizable:
        kind = skeleton.kind(name)
        if name in shared or not should_convert_module(name, left_out) or (kind is Kind.EMBEDDING and not embeddings):
            continue
        modules.append(_module(name, kind, *_bits(name, widths), skeleton))
    return Layout(tuple(modules), KV_LEAVES)


def _bits(name: str, widths: list[tuple[re.Pattern[str], int]]) -> tuple[int, int | None]:
    """A module's width by the first pattern, and by the leftmost match where that is another."""
    *patterns, (_, default) = widths
    found = [(match.start(), bits) for pattern, bits in patterns if (match := pattern.search(name))]
    if not found:
        return default, None
    first, leftmost = found[0][1], min(found, key=lambda item: item[0])[1]
    return first, None if leftmost == first else leftmost


def _module(name: str, kind: Kind, bits: int, other_bits: int | None, skeleton: Skeleton) -> ModuleLayout:
    if kind is Kind.EMBEDDING:
        return ModuleLayout(
            name=name,
            kind=kind,
            shape=skeleton.shape(name),
            num_bits=bits,
            other_bits=other_bits,
            group_size=None,
            storage=Storage.GEMMA,
            weight=f"{name}.embedding_quantized",
            scale=f"{name}.embedding_scale",
            groups_from_scale=True,
        )
    return ModuleLayout(
        name=name,
        kind=kind,
        shape=skeleton.shape(name),
        num_bits=bits,
        other_bits=other_bits,
        group_size=None,
        storage=Storage.GEMMA,
        weight=f"{name}.weight",
        scale=f"{name}.weight_scale",
        input_scale=f"{name}.input_activation_scale",
        output_scale=f"{name}.output_activation_scale",
        optional_activations=True,
        bias=skeleton.bias(name),
    )
