"""KV-cache ranges: what attention writes, keys after their norm and rotary embedding, values after their norm.

The scales cover everything seen: a clipped key turns, and what reads it is a softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bytelane.cache import cache_keyword
from bytelane.checkpoint import KVScales
from bytelane.errors import ModelConfigError
from bytelane.quantize.observe import Statistics, range_scale


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
def observe_kv(
    model: PreTrainedModel, windows: Iterable[Tensor], *, progress: Callable[[int], None] | None = None
) -> dict[str, KVScales]:
    """KV-cache scales that clip nothing, by name of the attention module that writes.

    Args:
        model: the float model.
        windows: int64 `[length]` token ids each.
        progress: called with the windows read.

    Raises:
        CalibrationError: a range is zero or not finite.
        ModelConfigError: the model's attention modules do not say which layer of a cache is theirs.
    """
    seen: dict[int, tuple[Statistics, Statistics]] = {}
    device = next(model.parameters()).device
    for done, window in enumerate(windows, start=1):
        cache = _ObservingCache(model, seen)
        model(input_ids=window[None].to(device), use_cache=True, **{cache_keyword(model): cache})
        if progress is not None:
            progress(done)
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
