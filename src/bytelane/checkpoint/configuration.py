"""The `quantization_config` that goes with written modules, for both storages.

A configuration names modules by patterns, and readers disagree about what wins when two patterns match. Here none do:
every pattern is anchored and matches the modules of one scheme only. Each configuration is checked before it is used,
by matching it against all known names the way its readers will.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match, match_targets
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from bytelane.checkpoint import compressed, gemma
from bytelane.checkpoint.patterns import compact, is_pattern
from bytelane.checkpoint.types import QuantizedModule
from bytelane.errors import NotRepresentableError
from bytelane.scheme import Kind, LinearScheme, Storage

STORAGES = (compressed.METHOD, gemma.METHOD)
"""The names of the storages, which are also their `quant_method`."""


def stored_as(module: QuantizedModule, storage: str) -> Storage:
    """How a module's codes lie in a storage.

    Raises:
        NotRepresentableError: Gemma storage has no such width, or no group scales for a linear.
    """
    if storage == compressed.METHOD:
        return Storage.PACK_QUANTIZED if module.storage is Storage.GEMMA else module.storage
    weight = module.scheme.weight
    if weight.num_bits not in gemma.WIDTHS:
        raise NotRepresentableError(f"Gemma storage has 2, 4 and 8 bits, not {weight.num_bits}", tensor=module.name)
    if module.kind is Kind.LINEAR and module.groups > 1:
        raise NotRepresentableError(
            f"Gemma storage has one scale per output channel of a linear, not groups of {weight.group_size}",
            tensor=module.name,
        )
    return Storage.GEMMA


def _int8() -> QuantizationArgs:
    """A static symmetric int8 tensor: activations and the KV cache."""
    return QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False)


def _scheme(module: QuantizedModule, storage: Storage, targets: list[str]) -> QuantizationScheme:
    weight = module.scheme.weight
    grouped = weight.group_size is not None
    linear = module.scheme if isinstance(module.scheme, LinearScheme) else None
    return QuantizationScheme(
        targets=targets,
        weights=QuantizationArgs(
            num_bits=weight.num_bits,
            type="int",
            symmetric=True,
            strategy="group" if grouped else "channel",
            group_size=weight.group_size,
            dynamic=False,
        ),
        input_activations=_int8() if linear and linear.quantize_input else None,
        output_activations=_int8() if linear and linear.quantize_output else None,
        format=storage.value,
    )


def _prefixed(entries: Sequence[str]) -> list[str]:
    """Entries in the spelling of compressed-tensors."""
    return [f"re:{e}" if is_pattern(e) else e for e in entries]


def compressed_config(
    modules: Sequence[QuantizedModule], left: Sequence[str], *, kv_scales: bool = False
) -> dict[str, Any]:
    """The compressed-tensors configuration of a set of modules.

    Modules of one scheme and format form a group, embeddings apart from linears; each group carries its own `format`,
    and the global one is `mixed-precision` where they differ.

    Args:
        modules: the quantized modules.
        left: linear and embedding modules left unquantized or tied; they are listed in `ignore`, since some readers
            refuse a linear that neither a target nor `ignore` names.
        kv_scales: whether the checkpoint has KV-cache scales.

    Raises:
        NotRepresentableError: no set of patterns means exactly these modules.
    """
    universe = [m.name for m in modules] + list(left)
    grouped: dict[tuple[Any, ...], list[QuantizedModule]] = {}
    for module in modules:
        key = (module.kind, module.scheme, stored_as(module, compressed.METHOD))
        grouped.setdefault(key, []).append(module)
    groups: dict[str, QuantizationScheme] = {}
    for i, ((_, _, storage), members) in enumerate(grouped.items()):
        targets = _prefixed(compact([m.name for m in members], universe))
        groups[f"group_{i}"] = _scheme(members[0], storage, targets)
    formats = {key[2].value for key in grouped}
    ignore = _prefixed(compact(left, universe))
    _check_targets(groups, ignore, grouped, left)
    config = QuantizationConfig(
        config_groups=groups,
        quant_method=compressed.METHOD,
        format=formats.pop() if len(formats) == 1 else compressed.MIXED_FORMAT,
        quantization_status="compressed",
        ignore=ignore,
        kv_cache_scheme=_int8() if kv_scales else None,
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return dumped


def _check_targets(
    groups: Mapping[str, QuantizationScheme],
    ignore: list[str],
    grouped: Mapping[tuple[Any, ...], list[QuantizedModule]],
    left: Sequence[str],
) -> None:
    """Match the targets back with the package's helpers; names alone must decide."""
    anything = nn.Identity()
    by_target = {target: name for name, group in groups.items() for target in group.targets}
    wanted = {m.name: group for group, members in zip(groups, grouped.values(), strict=True) for m in members}
    for name in (*wanted, *left):
        ignored = is_match(name, anything, ignore) if ignore else False
        found = {by_target[t] for t in match_targets(name, anything, by_target)}
        if ignored != (name not in wanted) or found != ({wanted[name]} if name in wanted else set()):
            raise NotRepresentableError(
                f"its name cannot be told from others: the targets put it in {sorted(found) or 'no group'}", tensor=name
            )


def gemma_config(modules: Sequence[QuantizedModule], left: Sequence[str]) -> dict[str, Any]:
    """The Gemma configuration of a set of modules.

    `num_bits` is the most common width; `module_quant_configs` names the others. `modules_to_not_convert` is always
    written, empty if need be: where it is absent, readers leave out the output head.

    Args:
        modules: the quantized modules.
        left: linear and embedding modules left unquantized or tied.

    Raises:
        NotRepresentableError: a width or granularity Gemma storage does not have, or no set of patterns means exactly
            these modules.
    """
    for module in modules:
        stored_as(module, gemma.METHOD)
    universe = [m.name for m in modules] + list(left)
    widths = Counter(m.scheme.weight.num_bits for m in modules)
    default = widths.most_common(1)[0][0] if widths else gemma.DEFAULT_BITS
    patterns: dict[str, dict[str, int]] = {}
    for bits in sorted(widths):
        if bits != default:
            for entry in compact([m.name for m in modules if m.scheme.weight.num_bits == bits], universe):
                patterns[entry if is_pattern(entry) else f"^{re.escape(entry)}$"] = {"num_bits": bits}
    names = [m.name for m in modules]
    plain = compact(left, universe)
    anchored = [e if is_pattern(e) else f"^{re.escape(e)}$" for e in plain]
    # A bare name also matches as a prefix and as a suffix; where that catches a quantized module, anchor it.
    left_out = plain if all(should_convert_module(n, plain) for n in names) else anchored
    for name in (*names, *left):
        if should_convert_module(name, left_out) != (name in set(names)):
            raise NotRepresentableError("modules_to_not_convert cannot tell its name from others", tensor=name)
    for module in modules:
        found = next((o["num_bits"] for p, o in patterns.items() if re.search(p, module.name)), default)
        if found != module.scheme.weight.num_bits:
            raise NotRepresentableError(f"module_quant_configs gives it {found} bits", tensor=module.name)
    return {
        "quant_method": gemma.METHOD,
        "num_bits": default,
        "quantize_embeddings": any(m.kind is Kind.EMBEDDING for m in modules),
        "module_quant_configs": patterns,
        "modules_to_not_convert": left_out,
    }
