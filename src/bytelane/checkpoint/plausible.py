"""Counts in a model's configuration that decide how much is built before any tensor is looked at.

The weightless model is built from `config.json` alone, and every layer of it costs time and memory. A configuration
that claims a billion layers must be refused before that; sizes need no such rule, since weightless tensors take no
memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelane.errors import ModelConfigError

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
