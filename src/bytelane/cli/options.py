"""Options that several commands share, as one value each instead of a list of parameters repeated in every command.

typer reads a command's parameters off its signature. `spread` shows it a signature in which a dataclass parameter is
replaced by its fields, and hands the command the dataclass: `--help` and parsing are as if the fields were written out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import get_type_hints

from bytelane.cli.output import (
    DeviceOption,
    DtypeOption,
    FloatOpsOption,
    KVCacheOption,
    NumericsOption,
    OverridesOption,
    ThreadsOption,
    TrustOption,
)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model, whatever its numerics."""

    dtype: DtypeOption = None
    device: DeviceOption = "cpu"
    threads: ThreadsOption = None
    float_ops: FloatOpsOption = "auto"
    overrides: OverridesOption = None
    trust_remote_code: TrustOption = False


@dataclass(frozen=True)
class RunOptions(LoadOptions):
    """How to load a model that generates."""

    numerics: NumericsOption = "integer"
    kv_cache: KVCacheOption = "auto"


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose dataclass parameters are given as options, one for each field. Every field has a default."""
    hints = get_type_hints(command, include_extras=True)
    shown: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not is_dataclass(hint):
            shown.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(hint, type)
        groups[parameter.name] = hint
        inner = get_type_hints(hint, include_extras=True)
        for field in fields(hint):
            assert field.default is not MISSING, f"{hint.__name__}.{field.name} has no default"
            shown.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=inner[field.name]
                )
            )

    @functools.wraps(command)
    def flat(**given: object) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**given, **made)

    flat.__dict__["__signature__"] = inspect.Signature(shown)
    flat.__annotations__ = {p.name: p.annotation for p in shown}
    del flat.__dict__["__wrapped__"]  # its own signature is not what typer should see
    return flat
