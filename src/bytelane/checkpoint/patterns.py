r"""Few readable patterns for many module names.

A model of forty layers has hundreds of module names and a handful of schemes. Numbers in a name count layers (or
experts), so names that differ only in a number share a pattern, `\d+` where every layer of the model is meant and the
list of layers where not; siblings under one parent share it too:

    ^model\.layers\.\d+\.mlp\.(gate_proj|up_proj)$
    ^model\.layers\.(0|1|2)\.self_attn\.(k_proj|v_proj)$
    lm_head

A pattern starts with `^` and ends with `$`; anything else is a name and means itself. Patterns over one model never
match a name that was not asked for, so their order carries no meaning for any reader.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_ANY = r"\d+"


def is_pattern(entry: str) -> bool:
    """Whether an entry is an anchored regular expression rather than a name."""
    return entry.startswith("^")


def matches(entry: str, name: str) -> bool:
    """Whether an entry means a name."""
    return re.match(entry, name) is not None if is_pattern(entry) else entry == name


def _split(name: str) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    """A name as its parts with None for each number, and the numbers."""
    parts = name.split(".")
    return tuple(None if p.isdecimal() else p for p in parts), tuple(p for p in parts if p.isdecimal())


def _alternatives(values: Iterable[str]) -> str:
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else f"({'|'.join(found)})"


def _fill(template: Sequence[str | None], numbers: Sequence[str]) -> tuple[str, str]:
    """A template with expressions for its numbers, as the pattern of the parent and of the last part."""
    left = iter(numbers)
    parts = [next(left) if p is None else re.escape(p) for p in template]
    return r"\.".join(parts[:-1]), parts[-1]


def compact(wanted: Collection[str], universe: Collection[str]) -> list[str]:
    """Names and anchored patterns that match `wanted` and nothing else of `universe`.

    Args:
        wanted: the names to match, all of them in `universe`.
        universe: every name the patterns may meet.

    Returns:
        Entries in the order in which their first name appears in `universe`.
    """
    names = set(wanted)
    known: dict[tuple[str | None, ...], list[tuple[str, ...]]] = {}
    for name in universe:
        template, numbers = _split(name)
        known.setdefault(template, []).append(numbers)
    leaves: dict[str, list[str]] = {}
    exact: dict[str, list[str]] = {}
    for template, all_numbers in known.items():
        chosen = [n for n in all_numbers if ".".join(_merge(template, n)) in names]
        for numbers, members in _index(chosen, all_numbers):
            parent, leaf = _fill(template, numbers)
            leaves.setdefault(parent, []).append(leaf)
            exact.setdefault(parent, []).extend(".".join(_merge(template, n)) for n in members)
    entries: list[str] = []
    for parent, found in leaves.items():
        literal = len(exact[parent]) == len(found)
        entries += exact[parent] if literal else [rf"^{parent}\.{_alternatives(found)}$" if parent else f"^{found[0]}$"]
    return entries


def _merge(template: Sequence[str | None], numbers: Sequence[str]) -> list[str]:
    left = iter(numbers)
    return [next(left) if p is None else p for p in template]


def _index(
    chosen: list[tuple[str, ...]], every: list[tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Expressions for the numbers of one template, each with the numbers it stands for."""
    if not chosen or not chosen[0]:
        return [((), chosen)] if chosen else []
    if len(chosen) > 1 and len(chosen) == len(every):
        return [((_ANY,) * len(chosen[0]), chosen)]
    # Some layers only: the first number is the layer, the others (an expert's) stay as they are.
    tails: dict[tuple[str, ...], list[str]] = {}
    for first, *rest in chosen:
        tails.setdefault(tuple(rest), []).append(first)
    return [((_alternatives(firsts), *tail), [(f, *tail) for f in firsts]) for tail, firsts in tails.items()]
