"""Memory for weights that are read from end to end, token after token.

With pages of 4 KiB a processor translates an address anew every 64 cache lines, and in a virtual machine each
translation walks two tables: there, reading weights from 2 MiB pages was up to twice as fast. Linux gives such pages to
whoever asks (`madvise`) unless it is told never to; where it gives none, the memory is ordinary memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bytelane import _native

HUGE_PAGE = 2 << 20
"""Bytes. Smaller tensors share pages with others and are left as they are."""


def streamed_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU; 2 MiB or more begin on a huge page, and ask for more of them."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = torch.empty(size + HUGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -block.data_ptr() % HUGE_PAGE
    data = block[start : start + size]
    _native.advise_huge_pages(data.data_ptr(), size)
    return data.view(dtype).reshape(shape)


def streamed(tensor: Tensor) -> Tensor:
    """A CPU tensor of 2 MiB or more copied to such memory; any other as it is."""
    if not tensor.is_cpu or tensor.nbytes < HUGE_PAGE:
        return tensor
    return streamed_empty(tensor.shape, tensor.dtype).copy_(tensor)


def streamed_cat(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` along the first dimension, CPU tensors to such memory."""
    first = tensors[0]
    if not first.is_cpu:
        return torch.cat(list(tensors))
    out = streamed_empty((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.dtype)
    return torch.cat(list(tensors), out=out)
