"""Gluon kernels run by torch, program after program: what they compute, not how it lies in threads and registers.

Gluon has no interpreter. Its kernels are Python, though: here their functions run as they are, with `gl` and what else
they name replaced by operations on torch tensors. Every address that is read or written is checked to lie inside its
tensor. Inline assembly is not run; the functions made of it are given in torch by the caller.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch


class Values(torch.Tensor):
    """A tensor with Triton's way to reinterpret bits."""

    def to(self, dtype: Any, bitcast: bool = False) -> Values:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)  # type: ignore[return-value]


def values(tensor: torch.Tensor) -> Values:
    return tensor.as_subclass(Values)


@dataclasses.dataclass(frozen=True)
class Pointers:
    """Places in a flat tensor, as many as `offset` has elements."""

    memory: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def to(self, dtype: torch.dtype) -> Pointers:
        return Pointers(self.memory.view(dtype))

    def __add__(self, offset: Any) -> Pointers:
        return Pointers(self.memory, self.offset + offset)

    def places(self, mask: torch.Tensor | None) -> torch.Tensor:
        at = torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()
        inside = (at >= 0) & (at < self.memory.numel())
        assert bool((inside if mask is None else inside | ~mask).all()), "an address outside its tensor"
        return at.clamp(0, max(self.memory.numel() - 1, 0))


class Shared:
    """An allocation in shared memory; what was never stored is not to be used."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def store(self, tensor: torch.Tensor) -> None:
        assert tensor.shape == self.tensor.shape
        self.tensor.copy_(tensor)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.tensor.permute(order))

    def load(self, layout: object) -> Values:
        return values(self.tensor.clone())


def load(at: Pointers, mask: Any = None, other: float = 0, cache_modifier: str = "") -> Values:
    found = at.memory[at.places(mask)]
    return values(found if mask is None else torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def store(at: Pointers, new: torch.Tensor, mask: Any = None) -> None:
    places = at.places(mask)
    kept = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.expand(places.shape)
    at.memory[places[kept]] = new.expand(places.shape)[kept].as_subclass(torch.Tensor)


def atomic_add(at: Pointers, add: int, sem: str = "") -> int:
    before = int(load(at))
    at.memory[at.places(None)] += add
    return before


def language(warps: int, program: tuple[int, int]) -> types.SimpleNamespace:
    """As much of `gl` as the kernels name."""
    dtypes = {n: getattr(torch, n) for n in ("bfloat16", "float16", "float32", "int8", "int32", "int64")}
    layouts = ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout", "SharedLinearLayout")
    return types.SimpleNamespace(
        **dtypes,
        **{name: lambda *_: None for name in layouts},
        num_warps=lambda: warps,
        program_id=lambda axis: values(torch.tensor(program[axis], dtype=torch.int32)),
        static_range=range,
        arange=lambda start, end, layout: values(torch.arange(start, end, dtype=torch.int32)),
        full=lambda shape, value, dtype, layout: values(torch.full(shape, value, dtype=dtype)),
        zeros=lambda shape, dtype, layout: values(torch.zeros(shape, dtype=dtype)),
        minimum=lambda a, b: torch.minimum(a, values(torch.tensor(b, dtype=a.dtype))),
        reshape=lambda t, shape: t.reshape(tuple(shape)),
        split=lambda t: t.unbind(-1),
        join=lambda a, b: torch.stack((a, b), -1),
        pointer_type=lambda dtype: dtype,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.empty(shape, dtype=dtype)),
        load=load,
        store=store,
        atomic_add=atomic_add,
    )


def product(left: torch.Tensor, right: torch.Tensor, acc: torch.Tensor) -> Values:
    """`mma_v2` of int8."""
    exact = left.as_subclass(torch.Tensor).long() @ right.as_subclass(torch.Tensor).long()
    return values(acc + exact.to(torch.int32))


def run(kernel: Any, grid: tuple[int, int], warps: int, given: dict[str, Any], *arguments: Any) -> None:
    """Every program of a kernel, one after the other.

    Args:
        kernel: the function under `gluon.jit`.
        grid: programs.
        warps: in each.
        given: by name, what its module's functions find instead of their own; constants too.
        arguments: the kernel's, tensors as they are.
    """
    source = kernel.fn.__globals__
    math = types.SimpleNamespace(div_rn=lambda a, b: a / b)
    pointed = [Pointers(a.detach().view(-1)) if isinstance(a, torch.Tensor) else a for a in arguments]
    for program in itertools.product(*map(range, grid)):
        names = dict(source)
        nothing: Callable[[], None] = lambda: None  # noqa: E731
        names.update(gl=language(warps, program), mma_v2=product, gdc_wait=nothing, gdc_launch_dependents=nothing)
        names.update(tl=types.SimpleNamespace(math=math, debug_barrier=nothing))
        for name, value in source.items():
            if callable(getattr(value, "fn", None)) and value.fn.__globals__ is source:
                names[name] = types.FunctionType(value.fn.__code__, names)
        names.update(given)
        types.FunctionType(kernel.fn.__code__, names)(*pointed)
