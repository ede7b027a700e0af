"""A tiny Gemma 4 whose float operations treat every row alone: what is left to differ is the cache and the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import bytelane
from bytelane import QuantLinear

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"


def gemma(**options: Any) -> Any:
    # torch's attention, which reads dequantized floats: what an oracle's float cache can be compared with
    return bytelane.load_model(GEMMA, dtype=options.pop("dtype", torch.float32), **{"float_ops": "torch", **options})


def _attention_per_query(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Each query alone, over the keys it may see and no others, in float64."""
    out = torch.zeros(query.shape, dtype=query.dtype)
    for b, h, t in np.ndindex(*query.shape[:3]):
        seen = attention_mask[b, 0, t] == 0
        group = h * key.shape[1] // query.shape[1]
        k, v = key[b, group][seen].double(), value[b, group][seen].double()
        weights = torch.softmax((k * query[b, h, t].double()).sum(-1) * scaling, 0)
        out[b, h, t] = (weights[:, None] * v).sum(0).to(query.dtype)
    return out.transpose(1, 2), None


class RowLinear(nn.Module):
    """A linear, one row at a time."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [self.linear(row[None]) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat(rows).reshape(*x.shape[:-1], -1)


def row_by_row(model: Any) -> Any:
    AttentionInterface.register("per_query", _attention_per_query)
    AttentionMaskInterface.register("per_query", eager_mask)
    model.set_attn_implementation("per_query")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear or (isinstance(module, QuantLinear) and module.input_scale is None):
            model.set_submodule(name, RowLinear(module))
    return model
