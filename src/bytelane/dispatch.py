"""The kernel table: which implementation runs an operation, and why not the others.

One visible table, best kernels first. `select` takes the first row that refuses nothing; `explain` returns every row
with its reason. There is no fallback hidden in a kernel: a kernel either takes a problem or says why not, and the last
row of each operation, the reference in plain torch, takes everything.

CUDA kernels are Triton's and need it installed and a device of compute capability 8.0 or later; `isa` is then `sm80`,
`sm90` and so on, of the current device.

The environment variable `BYTELANE_CPU_ISA` names the best CPU instruction set that may be used (`avx512amx`,
`avx512vbmi`, `avx512vnni`, `avxvnni`, `avx2`; `dotprod` on Arm; `portable`); it is read once per process. The results
are the same bits whatever it says.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bytelane.errors import ConfigError
from bytelane.kernels import cpu, gpu, reference
from bytelane.scheme import MAX_BITS, MIN_BITS

ALL_BITS = frozenset(range(MIN_BITS, MAX_BITS + 1))
HALVES = frozenset({torch.bfloat16, torch.float16})
FLOATS = HALVES | {torch.float32}
_CODES = frozenset({torch.int8})

ISA_VARIABLE = "BYTELANE_CPU_ISA"


@dataclass(frozen=True)
class Problem:
    """What a kernel is chosen for.

    Attributes:
        op: the operation's name in `torch.ops.bytelane`.
        device: the device type, `cpu` or `cuda`.
        dtype: of the activations.
        num_bits: weight width; 8 for operations without weights.
        group_size: inputs per scale, 0 for one scale per output channel.
        rows: M, the rows of activations.
    """

    op: str
    device: str
    dtype: torch.dtype
    num_bits: int = 8
    group_size: int = 0
    rows: int = 1


@dataclass(frozen=True)
class Machine:
    """What this process may use on one type of device: instruction sets (`sm90` and the like on CUDA), best first."""

    isas: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: unique, `<device>.<isa>.<path>`.
        op: the operation it implements.
        run: called with the operation's arguments.
        about: one line on how it works.
        device: the device type it needs; None for any.
        isa: the instruction set it needs; None for any.
        bits: the widths it takes.
        group_bits: the packed bits of a group must be a multiple of this; 1 for any group.
        part_bits: packed bits of a group that it takes beside those.
        dtypes: the activation dtypes it takes.
        min_rows: the fewest rows it takes.
        max_rows: the most rows it takes; None for any number.
        bind: of a `linear` that takes any number of rows: makes a call for one layer, with all but the activations
            checked, from `(dtype, in_features, weight, ..., group_size)`; None if it has no such call.
    """

    name: str
    op: str
    run: Callable[..., torch.Tensor]
    about: str
    device: str | None = None
    isa: str | None = None
    bits: frozenset[int] = ALL_BITS
    group_bits: int = 1
    part_bits: frozenset[int] = frozenset()
    dtypes: frozenset[torch.dtype] = FLOATS
    min_rows: int = 0
    max_rows: int | None = None
    bind: Callable[..., cpu.BoundLinear] | None = None

    def takes_group(self, bits: int) -> bool:
        """Whether it takes groups of so many packed bits."""
        return bits % self.group_bits == 0 or bits in self.part_bits

    def refusal(self, problem: Problem, machine: Machine) -> str | None:
        """Why this kernel does not take the problem; None when it does."""
        if self.device is not None and self.device != problem.device:
            return f"needs a {self.device} tensor, this is {problem.device}"
        if self.isa is not None and self.isa not in machine.isas:
            return f"needs {self.isa}, available here: {', '.join(machine.isas) or 'none'}"
        if problem.num_bits not in self.bits:
            return f"takes {_ranges(self.bits)} bits, this is {problem.num_bits}"
        if not self.takes_group(problem.group_size * problem.num_bits):
            parts = "".join(f"{part}, " for part in sorted(self.part_bits))
            return f"takes groups of {parts}{self.group_bits} bits and multiples, this has {problem.group_size} codes"
        if problem.dtype not in self.dtypes:
            return f"takes {', '.join(sorted(str(d) for d in self.dtypes))}, this is {problem.dtype}"
        if problem.rows < self.min_rows or (self.max_rows is not None and problem.rows > self.max_rows):
            return f"takes {self.min_rows} to {self.max_rows or 'any number of'} rows, this has {problem.rows}"
        return None


@dataclass(frozen=True)
class Choice:
    """A kernel and why each better-placed one was passed over (`refused`), and which come after it (`unused`)."""

    kernel: Kernel
    refused: tuple[tuple[Kernel, str], ...]
    unused: tuple[Kernel, ...]


def _ranges(bits: frozenset[int]) -> str:
    return ", ".join(str(b) for b in sorted(bits)) if bits != ALL_BITS else f"{MIN_BITS} to {MAX_BITS}"


def _cpu_rows(isa: str) -> list[Kernel]:
    def row(op: str, path: str, run: Callable[..., torch.Tensor], about: str, **limits: Any) -> Kernel:
        name = ".".join(part for part in ("cpu", isa, path) if part)
        return Kernel(name, op, run, about, device="cpu", isa=isa, **limits)

    packed = {"bits": frozenset(cpu.PACKED_BITS), "group_bits": cpu.GROUP_BITS, "part_bits": cpu.PART_BITS}
    rows = []
    for op, function in (("linear", cpu.linear), ("accumulate", cpu.accumulate)):
        dtypes = FLOATS if op == "linear" else _CODES
        for path, about, limits in (
            ("packed", "reads packed codes straight from the rows", packed),
            ("unpacked", "unpacks a block of rows to bytes, then dots bytes", {}),
        ):
            run = functools.partial(function, isa=isa, path=path)
            bind = functools.partial(cpu.BoundLinear, isa=isa, path=path) if op == "linear" else None
            rows.append(row(op, path, run, about, dtypes=dtypes, bind=bind, **limits))
    rows.append(
        row(
            "linear_weight_only",
            "float",
            functools.partial(cpu.linear_weight_only, isa=isa),
            "16-bit activations, sums in an order that K alone fixes; float32 ones keep torch's own matmul",
            dtypes=HALVES,
        )
    )
    rows.append(row("embedding", "", functools.partial(cpu.embedding, isa=isa), "gathers and dequantizes in one pass"))
    rows.append(row("quantize", "", functools.partial(cpu.quantize, isa=isa), "one pass over the activations"))
    rows.append(row("requantize", "", functools.partial(cpu.requantize, isa=isa), "one pass over the accumulators"))
    return rows


def _cuda_rows() -> list[Kernel]:
    if not gpu.TRITON:
        return []
    from bytelane.kernels import cuda

    def row(op: str, path: str, run: Callable[..., torch.Tensor], about: str, **limits: Any) -> Kernel:
        return Kernel(f"cuda.triton.{path}", op, run, about, device="cuda", isa="sm80", **limits)

    groups = {"group_bits": cuda.GROUP_BITS}
    about = "few rows: one launch; many: quantizes in one, then unpacks on the way to int8 tensor cores"
    return [
        row("linear", "linear", cuda.linear, about, **groups),
        row(
            "accumulate", "accumulate", cuda.accumulate, "puts codes in planes, then dots them", dtypes=_CODES, **groups
        ),
        row(
            "linear_weight_only",
            "float",
            cuda.linear_weight_only,
            "unpacks on the way to 16-bit tensor cores; 2 bits per channel in exact integers",
            dtypes=HALVES,
            **groups,
        ),
        row("embedding", "embedding", cuda.embedding, "gathers and dequantizes in one launch"),
        row("quantize", "quantize", cuda.quantize, "one pass over the activations"),
        row("requantize", "requantize", cuda.requantize, "one pass over the accumulators"),
    ]


def _table() -> tuple[Kernel, ...]:
    rows = [row for isa in cpu.compiled_isas() for row in _cpu_rows(isa)] + _cuda_rows()
    about = "plain torch on any device: correct, not fast"
    any_dtype = FLOATS | _CODES | {torch.float64}
    rows += [
        Kernel(f"reference.{op}", op, run, about, dtypes=any_dtype)
        for op, run in (
            ("linear", reference.linear),
            ("accumulate", reference.accumulate),
            ("quantize", reference.quantize),
            ("requantize", reference.requantize),
            ("linear_emulated", reference.linear_emulated),
            ("linear_weight_only", reference.linear_weight_only),
            ("embedding", reference.embedding),
        )
    ]
    return tuple(rows)


TABLE: tuple[Kernel, ...] = _table()


@functools.cache
def machine(device: str = "cpu") -> Machine:
    """What this process may use on a type of device; on the CPU after `BYTELANE_CPU_ISA`.

    Raises:
        ConfigError: the variable names an instruction set this build or this CPU does not have.
    """
    if device != "cpu":
        return Machine(gpu.supported_isas() if device == "cuda" else ())
    isas = cpu.supported_isas()
    limit = os.environ.get(ISA_VARIABLE)
    if limit is None:
        return Machine(isas)
    if limit not in isas:
        raise ConfigError(f"must be one of {', '.join(isas)}, found {limit!r}", tensor=ISA_VARIABLE)
    return Machine(isas[isas.index(limit) :])


@functools.lru_cache(maxsize=4096)
def select(op: str, device: str, dtype: torch.dtype, num_bits: int, group_size: int, rows: int) -> Kernel:
    """The kernel for a problem, given as `Problem`'s fields: the first row of the table that takes it."""
    return explain(Problem(op, device, dtype, num_bits, group_size, rows)).kernel


def explain(problem: Problem) -> Choice:
    """The kernel for a problem, with the reason of every row passed over on the way."""
    rows = [kernel for kernel in TABLE if kernel.op == problem.op]
    refused: list[tuple[Kernel, str]] = []
    for position, kernel in enumerate(rows):
        reason = kernel.refusal(problem, machine(problem.device))
        if reason is None:
            return Choice(kernel, tuple(refused), tuple(rows[position + 1 :]))
        refused.append((kernel, reason))
    raise ConfigError(f"no kernel takes {problem}: " + "; ".join(f"{k.name} {why}" for k, why in refused))
