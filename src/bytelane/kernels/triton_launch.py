"""Launching the Triton kernels: everything of a launch but its tensors is worked out once and kept.

A decoder layer at one token is some eight launches, so what Python does around each counts. Triton's own
`kernel[grid](...)` looks at every argument anew each time to find the compiled code; a `Launch` asks once, for tensors
aligned to 16 bytes as torch's are, and then only passes pointers. Tensors that lie otherwise take Triton's own way.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bytelane.kernels import triton_configs as configs
from bytelane.kernels.triton_codes import INTERPRETED, planes

GROUP_BITS = 8
"""A group is a whole multiple of this many bits, so that it is whole blocks (triton_codes.py) at every width."""

ALIGNED = 16
"""Bytes Triton takes a pointer to be a multiple of, where it is."""


class Layout(NamedTuple):
    """The shape of a layer's packed weight.

    Attributes:
        out_features: N.
        in_features: K.
        num_bits: the width.
        row_bytes: bytes in a row.
        groups: scales in a row.
        group_blocks: blocks of codes in a group, all of a row's without groups.
    """

    out_features: int
    in_features: int
    num_bits: int
    row_bytes: int
    groups: int
    group_blocks: int

    def even(self, bn: int, bb: int) -> bool:
        """Whether every tile lies inside the rows."""
        return 8 % self.num_bits == 0 and self.group_blocks % bb == 0 and self.out_features % bn == 0


@functools.lru_cache(maxsize=4096)
def layout(out_features: int, in_features: int, num_bits: int, group_size: int) -> Layout:
    """The layout of canonical rows.

    Raises:
        ValueError: a group that is no whole number of bytes.
    """
    group_size = 0 if group_size == in_features else group_size  # a group as long as the row is a channel
    if group_size * num_bits % GROUP_BITS:
        raise ValueError(f"groups of {group_size} codes of {num_bits} bits are no whole number of bytes")
    groups = in_features // group_size if group_size else 1
    blocks = -(-(group_size or in_features) // planes(num_bits))
    return Layout(out_features, in_features, num_bits, (in_features * num_bits + 7) // 8, groups, blocks)


@functools.lru_cache(maxsize=64)
def device_class(device: torch.device) -> str:
    """See `triton_configs.device_class`."""
    return configs.device_class(device)


@functools.lru_cache(maxsize=64)
def overlaps(device: torch.device) -> bool:
    """Whether the device's launches may overlap the one before (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def require(tensor: Tensor, dtype: torch.dtype, count: int, what: str) -> Tensor:
    """A tensor that has exactly the form a kernel reads."""
    if tensor.dtype is not dtype or tensor.numel() != count or not tensor.is_contiguous():
        raise ValueError(
            f"{what} must be {count} contiguous {dtype}, found {tuple(tensor.shape)} of {tensor.dtype}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return tensor


_notes: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[Launch, tuple[torch.dtype, ...]]]]:
    """Within, this thread's launches are noted, with their tensors' dtypes, and not made. Outputs stay unwritten."""
    found: list[tuple[Launch, tuple[torch.dtype, ...]]] = []
    token = _notes.set(found)
    try:
        yield found
    finally:
        _notes.reset(token)


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with everything of its launch but the tensors, which come first among its arguments.

    A product and a sum are two roundings in every kernel: floating-point fusion is always off.

    Attributes:
        kernel: the function under `triton.jit`.
        grid: programs, in one or two dimensions.
        numbers: the arguments after the tensors.
        constants: the `tl.constexpr` arguments, which come last.
        warps: in a program.
        stages: of the software pipeline.
        overlaps: whether it may begin while the launch before still runs.
    """

    kernel: Any
    grid: tuple[int, int]
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    overlaps: bool = False
    _arguments: tuple[Any, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        """Put the arguments after the tensors in the kernel's order."""
        names = self.kernel.arg_names[-len(self.constants) :]
        object.__setattr__(self, "_arguments", (*self.numbers, *(self.constants[name] for name in names)))

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles with."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options | ({"launch_pdl": True} if self.overlaps else {})

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the tensors' device."""
        if (notes := _notes.get()) is not None:
            notes.append((self, tuple([tensor.dtype for tensor in tensors])))
            return
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run(device.index, tensors)
        else:
            self._run(device.index, tensors)

    def _run(self, device: int | None, tensors: tuple[Tensor, ...]) -> None:
        pointers = 0
        for tensor in tensors:
            pointers |= tensor.data_ptr()
        if INTERPRETED or pointers % ALIGNED:
            self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        else:
            compiled = _compiled(self, device, tuple([tensor.dtype for tensor in tensors]))
            compiled[(*self.grid, 1)](*tensors, *self._arguments)


@functools.lru_cache(maxsize=8192)
def _compiled(launch: Launch, device: int | None, dtypes: tuple[torch.dtype, ...]) -> Any:
    """The code of a launch on the current device, `device`, for aligned tensors of these dtypes."""
    del device  # a part of the key: code is loaded into one device
    return launch.kernel.warmup(*dtypes, *launch.numbers, grid=launch.grid, **launch.constants, **launch.options)
