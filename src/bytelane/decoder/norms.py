"""The norms of a model on a CUDA device: one launch each, where transformers' modules take six to eight.

A token of a small model is launch-bound on a GPU, and norms are two thirds of its launches. The bits are those of the
CPU's norms (csrc/cpu/float_ops.hpp). Under `torch.compile`, with gradients, or where a weight has another dtype than
the order of roundings wants, a norm keeps transformers' own forward.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bytelane.decoder.parts import NormPart, norm_part
from bytelane.dispatch import FLOATS
from bytelane.kernels import gpu

if TYPE_CHECKING:
    from bytelane.kernels.cuda_norm import NormForm


def norm_form(part: NormPart) -> NormForm:
    """How a norm rounds, for the kernel."""
    from bytelane.kernels.cuda_norm import NormForm

    return NormForm(part.eps, part.weight_in_t, part.plus_one)


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    """The `forward` bound to a norm; `bytelane_norm` says how it rounds."""
    from bytelane.kernels.cuda_norm import MAX_WIDTH, norm

    part: NormPart = self.bytelane_norm
    weight: Tensor | None = getattr(self, "weight", None)
    plain = x.is_cuda and x.dtype in FLOATS and x.shape[-1] <= MAX_WIDTH
    grad = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    fits = weight is None or weight.dtype is x.dtype or (not part.weight_in_t and weight.dtype in FLOATS)
    if torch.compiler.is_compiling() or not plain or grad or not fits:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    return norm(x, weight, norm_form(part))


def install_norms(model: PreTrainedModel) -> int:
    """Give every known norm of a model's decoder bytelane's forward, if the model is on a CUDA device.

    Returns:
        How many norms have it.
    """
    if not gpu.runs_on(model.device):
        return 0
    decoder: Any = model.get_decoder()
    parts = {module: norm_part(module) for module in decoder.modules()}
    known = {module: part for module, part in parts.items() if part is not None}
    for module, part in known.items():
        bound: Any = module
        bound.bytelane_norm = part
        # on the instance and as a bound method, as in forward.py
        bound.forward = types.MethodType(_norm_forward, module)
    return len(known)
