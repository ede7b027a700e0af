"""Reading compressed-tensors configurations: which module has which scheme, and where its tensors lie.

The package's own models parse the configuration and its own helpers match modules, so a name, a class or a `re:`
pattern means here what it means there. What bytelane does not run is refused on the raw values first, one error class
for each rule, because the package would either accept it or refuse it as a generic validation error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.utils.match import is_match, match_targets

from bytelane.checkpoint.expressions import check_ends, compiled
from bytelane.checkpoint.layout import Layout, ModuleLayout, Skeleton
from bytelane.errors import (
    AsymmetricError,
    ConfigError,
    DynamicActivationError,
    GroupSizeError,
    UnsupportedFormatError,
    UnsupportedStrategyError,
    UnsupportedTypeError,
    UnsupportedWidthError,
)
from bytelane.scheme import MAX_BITS, MIN_BITS, Kind, Storage

METHOD = "compressed-tensors"
MIXED_FORMAT = "mixed-precision"
KV_LEAVES = ("k_scale", "v_scale")
ZERO_POINT_SUFFIX = "_zero_point"

_ROOT = "quantization_config"


def _check_common(args: Any, key: str, file: Path) -> Mapping[str, Any]:
    """Integer and symmetric: what weights, activations and the KV cache have in common."""
    if not isinstance(args, dict):
        raise ConfigError(f"must be an object, found {type(args).__name__}", file=file, tensor=key)
    kind = str(args.get("type", "int")).lower()
    if kind != "int":
        raise UnsupportedTypeError(f"must be int, found {kind}", file=file, tensor=f"{key}.type")
    if args.get("symmetric", True) is not True:
        raise AsymmetricError("must be true: the scheme has no zero points", file=file, tensor=f"{key}.symmetric")
    size = args.get("group_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise GroupSizeError(f"must be an integer, found {size!r}", file=file, tensor=f"{key}.group_size")
    return args


def _strategy(args: Mapping[str, Any]) -> str:
    """The granularity, inferred from the group size where it is not given, as the package infers it."""
    if args.get("strategy") is not None:
        return str(args["strategy"]).lower()
    size = args.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _check_weights(args: Any, key: str, file: Path) -> None:
    """Refuse weights other than static symmetric integers of 2 to 8 bits with channel or group scales."""
    checked = _check_common(args, key, file)
    bits = checked.get("num_bits", 8)
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        rule = f"weights have {MIN_BITS}..{MAX_BITS} bits, found {bits}"
        raise UnsupportedWidthError(rule, file=file, tensor=f"{key}.num_bits")
    if checked.get("dynamic", False) is not False:
        raise ConfigError("weight scales are static, found dynamic", file=file, tensor=f"{key}.dynamic")
    strategy = _strategy(checked)
    if strategy not in ("channel", "group"):
        raise UnsupportedStrategyError(
            f"weight scales are per channel or group, found {strategy}", file=file, tensor=f"{key}.strategy"
        )
    size = checked.get("group_size")
    if strategy == "group" and (size is None or size <= 0):
        raise GroupSizeError(
            f"group scales need a positive group size, found {size}", file=file, tensor=f"{key}.group_size"
        )
    order = checked.get("actorder")
    if order is True or str(order).lower() in ("group", "dynamic"):
        raise UnsupportedStrategyError(
            f"inputs keep their order within a row, found actorder {order}", file=file, tensor=f"{key}.actorder"
        )


def _check_activations(args: Any, key: str, file: Path) -> None:
    """Refuse activations (or a KV cache) other than static symmetric int8 with one scale for the tensor."""
    checked = _check_common(args, key, file)
    if checked.get("num_bits", 8) != 8:
        raise UnsupportedWidthError(f"must be 8, found {checked['num_bits']}", file=file, tensor=f"{key}.num_bits")
    if checked.get("dynamic", False) is not False:
        raise DynamicActivationError(
            f"activation scales are static, found dynamic {checked['dynamic']}", file=file, tensor=f"{key}.dynamic"
        )
    strategy = _strategy(checked)
    if strategy != "tensor":
        raise UnsupportedStrategyError(
            f"activations have one scale for the tensor, found {strategy}", file=file, tensor=f"{key}.strategy"
        )


def _check_patterns(patterns: Any, key: str, file: Path) -> None:
    """Refuse a `re:` entry that is not a regular expression."""
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError("must be a list of strings", file=file, tensor=key)
    for pattern in patterns:
        if pattern.startswith("re:"):
            compiled(pattern.removeprefix("re:"), key, file)


def _expand(name: str, group: Any, file: Path) -> Mapping[str, Any]:
    """A config group as a dictionary; the package's presets are given as a list of targets under the preset's name."""
    key = f"{_ROOT}.config_groups.{name}"
    if isinstance(group, list):
        _check_patterns(group, key, file)
        try:
            preset: Mapping[str, Any] = preset_name_to_scheme(name, group).model_dump()
        except KeyError as cause:
            raise ConfigError(f"no preset scheme is called {name!r}", file=file, tensor=key) from cause
        return preset
    if not isinstance(group, dict):
        raise ConfigError(f"must be an object, found {type(group).__name__}", file=file, tensor=key)
    return group


def _check_group(name: str, group: Mapping[str, Any], global_format: Any, file: Path) -> None:
    key = f"{_ROOT}.config_groups.{name}"
    _check_patterns(group.get("targets"), f"{key}.targets", file)
    if group.get("weights") is None:
        raise ConfigError("every group quantizes weights, this one does not", file=file, tensor=f"{key}.weights")
    _check_weights(group["weights"], f"{key}.weights", file)
    for side in ("input_activations", "output_activations"):
        if group.get(side) is not None:
            _check_activations(group[side], f"{key}.{side}", file)
    found = group.get("format") or global_format
    known = (Storage.PACK_QUANTIZED.value, Storage.INT_QUANTIZED.value)
    if found not in known:
        raise UnsupportedFormatError(f"must be {' or '.join(known)}, found {found}", file=file, tensor=f"{key}.format")


def parse_config(raw: Mapping[str, Any], file: Path) -> QuantizationConfig:
    """A `quantization_config` as the package's own model.

    Args:
        raw: the dictionary from config.json.
        file: named in errors.

    Raises:
        ConfigError: or the subclass that names the rule: see FORMAT.md.
    """
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError("must be an object with one group or more", file=file, tensor=f"{_ROOT}.config_groups")
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        found = raw.get(key)
        if found and not (isinstance(found, dict) and found.get("format") == "dense"):
            raise ConfigError("bytelane runs neither sparsity nor transforms", file=file, tensor=f"{_ROOT}.{key}")
    status = raw.get("quantization_status", "compressed")
    if status != "compressed":
        raise ConfigError(f"must be compressed, found {status}", file=file, tensor=f"{_ROOT}.quantization_status")
    expanded = {name: _expand(name, group, file) for name, group in groups.items()}
    for name, group in expanded.items():
        _check_group(name, group, raw.get("format"), file)
    _check_patterns(raw.get("ignore") or [], f"{_ROOT}.ignore", file)
    if raw.get("kv_cache_scheme") is not None:
        _check_activations(raw["kv_cache_scheme"], f"{_ROOT}.kv_cache_scheme", file)
    try:
        return QuantizationConfig.model_validate({**raw, "config_groups": expanded})
    except (ValueError, TypeError, NotImplementedError) as cause:
        raise ConfigError(f"refused by compressed-tensors: {cause}", file=file, tensor=_ROOT) from cause


def describe(raw: Mapping[str, Any], skeleton: Skeleton, shared: frozenset[str], file: Path) -> Layout:
    """The layout a compressed-tensors configuration gives a model.

    A module that several targets match takes the most specific one (exact name, then pattern, then class), as in the
    package.

    Args:
        raw: the `quantization_config`.
        skeleton: the model.
        shared: modules that have no tensors of their own, being tied to another.
        file: named in errors.

    Raises:
        ConfigError: or the subclass that names the rule.
    """
    config = parse_config(raw, file)
    ignore = config.ignore or []
    schemes: dict[str, QuantizationScheme] = {}
    for group in config.config_groups.values():
        schemes.update(dict.fromkeys(group.targets, group))
    patterns = [target.removeprefix("re:") for target in (*schemes, *ignore) if target.startswith("re:")]
    check_ends(patterns, skeleton.quantizable, f"{_ROOT}.config_groups", file)
    modules = []
    for name, module in skeleton.quantizable.items():
        if name in shared or is_match(name, module, ignore):
            continue
        matched = match_targets(name, module, schemes)
        if matched:
            modules.append(_module(name, schemes[matched[0]], str(config.format), skeleton, file))
    has_kv = config.kv_cache_scheme is not None
    return Layout(tuple(modules), KV_LEAVES if has_kv else None, kv_required=has_kv)


def _module(name: str, scheme: QuantizationScheme, global_format: str, skeleton: Skeleton, file: Path) -> ModuleLayout:
    """The layout of one module under its scheme."""
    kind = skeleton.kind(name)
    inputs, outputs = scheme.input_activations is not None, scheme.output_activations is not None
    if kind is Kind.EMBEDDING and (inputs or outputs):
        raise ConfigError("an embedding table has no activations to quantize", file=file, tensor=name)
    # An enum member or its value, depending on the package's version.
    storage = Storage(getattr(scheme.format, "value", scheme.format) or global_format)
    packed = storage is Storage.PACK_QUANTIZED
    return ModuleLayout(
        name=name,
        kind=kind,
        shape=skeleton.shape(name),
        num_bits=scheme.weights.num_bits,
        group_size=scheme.weights.group_size if _strategy(scheme.weights.model_dump()) == "group" else None,
        storage=storage,
        weight=f"{name}.weight_packed" if packed else f"{name}.weight",
        scale=f"{name}.weight_scale",
        weight_shape=f"{name}.weight_shape" if packed else None,
        input_scale=f"{name}.input_scale" if inputs else None,
        output_scale=f"{name}.output_scale" if outputs else None,
        bias=skeleton.bias(name),
    )
