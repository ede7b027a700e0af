"""What was found of one kernel: shared by the two halves of `bytelane verify`'s proof."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelCheck:
    """What was found of one kernel.

    Attributes:
        kernel: its name in the dispatch table; `cpu.<isa>.between` for the native operations between the layers.
        op: the operation.
        problems: how many it was given.
        values: outputs compared.
        differing: outputs that were not what the oracle says.
        first: the first problem with a difference, described; None without one.
        skipped: why it was not run; None when it was.
    """

    kernel: str
    op: str
    problems: int = 0
    values: int = 0
    differing: int = 0
    first: str | None = None
    skipped: str | None = None
