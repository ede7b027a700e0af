"""Where tuning starts: weight scales of least squared error, and the KV cache's ranges.

Activation ranges come from the recipe, as in `bytelane quantize`. A weight scale that clips nothing wastes a 2-bit grid
on one outlier, so each row or group starts at the best of a grid of shrunken scales: the one with the smallest
`sum (c s - w)^2`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bytelane.cache import cache_keyword
from bytelane.checkpoint import KVScales
from bytelane.errors import ModelConfigError
from bytelane.quantize.observe import Statistics, range_scale
from bytelane.quantize.rounding import round_to_nearest
from bytelane.scheme import WeightScheme, code_range
from bytelane.tune.fake import grouped, round_weight

SHRINK = tuple(1.0 - 0.025 * i for i in range(33))
"""What a scale that clips nothing is multiplied by: 1 down to 0.2."""


@torch.no_grad()
def start_weight_scale(weight: Tensor, scheme: WeightScheme, name: str = "weight") -> Tensor:
    """The scales `[rows, groups]`, float32, of least squared error on a grid below the one that clips nothing.

    Args:
        weight: `[rows, columns]`, floating point.
        scheme: width and granularity.
        name: named in errors.

    Raises:
        CheckpointError: as for `round_to_nearest`.
    """
    _, widest = round_to_nearest(weight, scheme, name)
    low, high = code_range(scheme.num_bits)
    w = weight.detach().to(torch.float32)
    best, least = widest, torch.full_like(widest, torch.inf)
    for factor in SHRINK:
        scale = widest * factor
        codes, _ = round_weight(w, scale, low, high)
        error = (grouped(codes, scale) * scale[..., None] - grouped(w, scale)).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


class _ObservingCache(DynamicCache):
    """Notes the statistics of what a forward pass would write, and stores nothing."""

    def __init__(self, model: PreTrainedModel, seen: dict[int, tuple[Statistics, Statistics]]) -> None:
        super().__init__(config=model.config)
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the states of one layer and hand them back."""
        pair = self.seen.setdefault(layer_idx, (Statistics(), Statistics()))
        for statistics, states in zip(pair, (key_states, value_states), strict=True):
            statistics.add(Statistics.of(states, histogram=False))
        return key_states, value_states


@torch.no_grad()
def observe_kv(model: PreTrainedModel, windows: Iterable[Tensor]) -> dict[str, KVScales]:
    """KV-cache scales that clip nothing, by name of the attention module that writes.

    Args:
        model: the float model.
        windows: int64 `[length]` token ids each.

    Raises:
        CalibrationError: a range is zero or not finite.
    """
    seen: dict[int, tuple[Statistics, Statistics]] = {}
    device = next(model.parameters()).device
    for window in windows:
        cache = _ObservingCache(model, seen)
        model(input_ids=window[None].to(device), use_cache=True, **{cache_keyword(model): cache})
    names = attention_names(model)
    return {
        names[index]: KVScales(
            float(range_scale(keys.amax(), names[index], "key")),
            float(range_scale(values.amax(), names[index], "value")),
        )
        for index, (keys, values) in sorted(seen.items())
    }


def attention_names(model: PreTrainedModel) -> dict[int, str]:
    """The attention modules of the decoder by the index they pass to a cache.

    Raises:
        ModelConfigError: none says its index.
    """
    decoder = model.get_decoder()
    prefix = next((f"{name}." if name else "" for name, m in model.named_modules() if m is decoder), "")
    found: dict[int, str] = {}
    for name, module in decoder.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and not any(_indexed(child) for child in module.modules() if child is not module):
            found[index] = prefix + name
    if not found:
        raise ModelConfigError("none of its attention modules has a layer_idx, so its KV cache cannot be quantized")
    return found


def _indexed(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)
