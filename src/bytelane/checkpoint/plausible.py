"""What a configuration's values must be before transformers acts on them.

The weightless model is built from `config.json` alone, and every layer of it costs time and memory. A configuration
that claims a billion layers must be refused before that; sizes need no such rule, since weightless tensors take no
memory. Settings of generation are not looked at by transformers until a token is chosen, and then fail anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelane.errors import ConfigError, ModelConfigError

MAX_MODULES = 1024
"""Layers, blocks or experts: several times what any model has."""

_COUNTS = re.compile(r"(^|_)(layers?|depth|blocks|experts)$")


def check_counts(config: Mapping[str, Any], file: Path, path: str = "") -> None:
    """Refuse a configuration that would build an absurd number of modules.

    Args:
        config: config.json, or a part of it.
        file: named in errors.
        path: of the part.

    Raises:
        ModelConfigError: more than `MAX_MODULES` layers, blocks or experts.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value, file, f"{path}{key}.")
        elif isinstance(value, int | float) and _COUNTS.search(key) and value > MAX_MODULES:
            raise ModelConfigError(f"at most {MAX_MODULES} are built, found {value:.6g}", file=file, tensor=path + key)


_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
_LEAST = {"temperature": 0.0, "top_p": 0.0, "min_p": 0.0, "repetition_penalty": 1e-6}
_MOST = {"top_p": 1.0, "min_p": 1.0}
_WHOLE = ("top_k", "max_new_tokens", "num_beams")
_SWITCHES = ("do_sample", "use_cache")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_generation(config: Mapping[str, Any], file: Path) -> None:
    """Refuse settings of generation that no token could be chosen by. A key that is null counts as absent.

    Args:
        config: generation_config.json.
        file: named in errors.

    Raises:
        ConfigError: a token that is no token id, a number out of its range, a switch that is no boolean.
    """
    for key in _TOKENS:
        value = config.get(key)
        several = key == "eos_token_id" and isinstance(value, list)
        if value is not None and not all(map(_whole, value if several else [value])):
            raise ConfigError(
                f"must be a token id{' or a list of them' * several}, found {value!r}", file=file, tensor=key
            )
    for key, least in _LEAST.items():
        value, most = config.get(key), _MOST.get(key, math.inf)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (number and least <= value <= most):
            raise ConfigError(
                f"must be a finite number from {least:g} to {most:g}, found {value!r}", file=file, tensor=key
            )
    for key in _WHOLE:
        if config.get(key) is not None and not _whole(config[key]):
            raise ConfigError(f"must be a whole number from 0, found {config[key]!r}", file=file, tensor=key)
    for key in _SWITCHES:
        if config.get(key) is not None and not isinstance(config[key], bool):
            raise ConfigError(f"must be true or false, found {config[key]!r}", file=file, tensor=key)
