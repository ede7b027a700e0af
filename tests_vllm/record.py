"""Run in an engine's worker processes: keep what every linear layer, table and head is given and gives.

`start` and `collect` are sent to the workers through `LLM.apply_model`, so this module must be importable there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Records = dict[str, list[tuple[Tensor, Tensor]]]


def _keep(records: Records, name: str, x: Any, y: Any) -> None:
    y = y[0] if isinstance(y, tuple) else y
    records.setdefault(name, []).append((x.detach().clone(), y.detach().clone()))


def start(model: nn.Module) -> int:
    """Hook every layer that bytelane runs; returns how many there are."""
    from bytelane.integrations.vllm.embedding import BytelaneEmbeddingMethod
    from bytelane.integrations.vllm.linear import BytelaneLinearMethod

    records: Records = {}
    model.bytelane_records = records
    text = getattr(model, "language_model", model)  # of a multimodal model
    count = 0
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, BytelaneLinearMethod | BytelaneEmbeddingMethod):
            continue
        count += 1
        head = name.rpartition(".")[2] == "lm_head"
        if head or (name.endswith("embed_tokens") and text.lm_head is module):
            _hook_head(method, records)
        if not head:
            module.register_forward_hook(lambda _m, inputs, y, name=name: _keep(records, name, inputs[0], y))
    return count


def _hook_head(method: Any, records: Records) -> None:
    apply = method.apply

    def recorded(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = apply(layer, x, bias)
        _keep(records, "lm_head", x, y)
        return y

    method.apply = recorded


def collect(model: nn.Module) -> Records:
    """What was kept since the last call."""
    found = dict(model.bytelane_records)
    model.bytelane_records.clear()
    return found


def count_reductions(model: nn.Module) -> None:
    """Count the bytes handed to the all-reduce by row-parallel layers."""
    from bytelane.integrations.vllm import linear

    model.bytelane_reduced = []
    real = linear.tensor_model_parallel_all_reduce

    def counted(tensor: Tensor) -> Tensor:
        model.bytelane_reduced.append((tuple(tensor.shape), tensor.numel() * tensor.element_size()))
        return real(tensor)

    linear.tensor_model_parallel_all_reduce = counted


def reductions(model: nn.Module) -> list[tuple[tuple[int, ...], int]]:
    """What `count_reductions` has counted since the last call."""
    found = list(model.bytelane_reduced)
    model.bytelane_reduced.clear()
    return found


def threads(model: nn.Module) -> int:
    """OpenMP threads of the worker."""
    return torch.get_num_threads()
