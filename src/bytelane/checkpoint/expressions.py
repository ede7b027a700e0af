r"""Regular expressions that come with a checkpoint: compiled with named errors, and never left to run for ever.

Configurations name modules by patterns, and Python's matcher backtracks: `^(\w+)+$` on a name of forty characters
takes longer than anybody waits, and cannot be interrupted. Two things decide whether a pattern may be used here:

- *plain* patterns, by their text: no repeated group, few repetitions and few choices. Their work is bounded by a small
  power of the name's length. All patterns that writers make are such.
- any other pattern is first tried on all names in a process of its own that is given a few seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from bytelane.errors import ConfigError

MAX_LENGTH = 1 << 16
"""Characters of a pattern; one that lists every layer of a large model has thousands."""
SECONDS = 5.0
"""What patterns that are not plain may take on all names together."""

_MAX_REPETITIONS = 3
_MAX_OPTIONS = 6
_MAX_CHOICES = 1 << 12

_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in map(re.compile, patterns):
    for name in names:
        pattern.search(name), pattern.match(name)
"""


def compiled(pattern: str, key: str, file: Path) -> re.Pattern[str]:
    """A pattern of a configuration.

    Args:
        pattern: the expression.
        key: the configuration key it stands under, for errors.
        file: named in errors.

    Raises:
        ConfigError: it is too long, or not a regular expression.
    """
    if len(pattern) > MAX_LENGTH:
        raise ConfigError(f"a pattern has at most {MAX_LENGTH} characters, found {len(pattern)}", file=file, tensor=key)
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as cause:
        shown = pattern if len(pattern) < 200 else f"{pattern[:200]}..."
        raise ConfigError(f"{shown!r} is not a regular expression: {cause}", file=file, tensor=key) from cause


def is_plain(pattern: str) -> bool:
    """Whether the work of a pattern is bounded by a small power of a name's length, seen from its text alone."""
    if re.search(r"\\[1-9]|\(\?P=|\(\?\(|\(\?[a-zA-Z-]+[:)]", pattern):  # refers back, or changes how text is read
        return False
    bare = re.sub(r"\\.", "e", pattern, flags=re.DOTALL)
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", bare)
    if re.search(r"\)[*+?{]", bare):  # repeats a group
        return False
    if len(re.findall(r"[*+]|\{\d*,?\d*\}", bare)) > _MAX_REPETITIONS:
        return False
    if len(re.findall(r"(?<!\()\?", bare)) > _MAX_OPTIONS:
        return False
    choices, open_groups = 1, [1]
    for character in bare:
        if character == "(":
            open_groups.append(1)
        elif character == "|":
            open_groups[-1] += 1
        elif character == ")" and len(open_groups) > 1:
            choices *= open_groups.pop()
    for alternatives in open_groups:
        choices *= alternatives
    return choices <= _MAX_CHOICES


def check_ends(patterns: Iterable[str], names: Collection[str], key: str, file: Path) -> None:
    """Refuse patterns that would not come to an end on these names.

    Args:
        patterns: expressions that compile.
        names: everything they will be matched with.
        key: the configuration key they stand under, for errors.
        file: named in errors.

    Raises:
        ConfigError: they take longer than `SECONDS` together, or cannot be tried.
    """
    doubtful = [pattern for pattern in dict.fromkeys(patterns) if not is_plain(pattern)]
    if not doubtful:
        return
    given = json.dumps([doubtful, list(names)])
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    shown = ", ".join(repr(p if len(p) < 80 else f"{p[:80]}...") for p in doubtful[:3])
    try:
        tried = subprocess.run(command, input=given, text=True, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as cause:
        raise ConfigError(
            f"matching {shown} with the model's names takes more than {SECONDS:.0f} s; repeat no groups",
            file=file,
            tensor=key,
        ) from cause
    except OSError as cause:
        raise ConfigError(f"{shown} cannot be tried in a process of its own: {cause}", file=file, tensor=key) from cause
    if tried.returncode != 0:
        raise ConfigError(f"matching {shown} fails: {tried.stderr.strip()[-200:]}", file=file, tensor=key)
