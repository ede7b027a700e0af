"""The int8 KV cache at a fixed length: what a compiled or graph-captured decoding step needs.

    cache = make_static_cache(model, 1024)
    model.generate(ids, **{cache_keyword(model): cache}, max_new_tokens=256)

On CUDA `generate` then compiles the step by itself and replays it as a CUDA graph.

It is transformers' `StaticCache` with layers that keep codes, as `bytelane.cache` does with the growing cache: written
and read by the same formulas, so the values attention sees are the same. Positions not yet written hold code 0; the
attention mask hides them. Every step reads the whole length, so make it no longer than the conversation needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from bytelane import ops as _ops  # noqa: F401  (registers torch.ops.bytelane)
from bytelane.cache import kv_scales
from bytelane.checkpoint import KVScales
from bytelane.errors import ModelConfigError


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`f32(codes) * scale`, cast to `dtype`."""
    return codes.to(torch.float32).mul_(scale).to(dtype)


class _Int8StaticStorage(StaticLayer):
    """Turns a static layer's storage into codes: quantizes what goes in, dequantizes what comes out."""

    def __init__(self, scales: KVScales, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scales = scales
        self.key_scale = torch.tensor(scales.k, dtype=torch.float32)
        self.value_scale = torch.tensor(scales.v, dtype=torch.float32)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the int8 storage, on the device of the states."""
        # The base class takes shapes, dtype and device from the tensors it is shown; the data is not used.
        super().lazy_initialization(
            torch.empty_like(key_states, dtype=torch.int8), torch.empty_like(value_states, dtype=torch.int8)
        )
        self.key_scale = self.key_scale.to(self.device)
        self.value_scale = self.value_scale.to(self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens, then read all positions.

        Args:
            key_states: `[batch, KV heads, new tokens, head dim]`, float32, bfloat16 or float16.
            value_states: likewise.
            args: for the base class.
            kwargs: for the base class.

        Returns:
            Dequantized keys and values `[batch, KV heads, positions, head dim]` in the dtype of the states.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        quantize = torch.ops.bytelane.quantize
        keys, values = super().update(
            quantize(key_states, self.key_scale), quantize(value_states, self.value_scale), *args, **kwargs
        )
        return (
            _dequantize(keys, self.key_scale, key_states.dtype),
            _dequantize(values, self.value_scale, value_states.dtype),
        )


class Int8StaticLayer(_Int8StaticStorage, StaticLayer):
    """A full-attention layer: `keys` and `values` are int8 `[batch, KV heads, positions, head dim]`."""


class Int8StaticSlidingWindowLayer(_Int8StaticStorage, StaticSlidingWindowLayer):
    """A sliding-window layer: as `Int8StaticLayer`, of at most `sliding_window` positions."""


class Int8StaticCache(StaticCache):
    """A static cache that stores int8 codes wherever the checkpoint has scales for it."""

    def __init__(self, config: PretrainedConfig, scales: Mapping[int, KVScales], max_cache_len: int) -> None:
        """Make an empty cache.

        Args:
            config: the model's configuration.
            scales: by index of the decoder layer; layers that reuse another one's keys and values are passed over.
            max_cache_len: positions, prompt and answer together.

        Raises:
            ModelConfigError: scales for a layer whose cache has no static int8 form.
        """
        super().__init__(config=config, max_cache_len=max_cache_len)
        for index, layer_scales in scales.items():
            if index < len(self.layers):
                self.layers[index] = _int8_layer(self.layers[index], layer_scales, index, max_cache_len)


def _int8_layer(layer: Any, scales: KVScales, index: int, max_cache_len: int) -> Any:
    if type(layer) is StaticLayer:
        return Int8StaticLayer(scales, max_cache_len=max_cache_len)
    if type(layer) is StaticSlidingWindowLayer:
        # The layer holds the window, or the whole length where that is shorter: either gives the same layer again.
        return Int8StaticSlidingWindowLayer(scales, max_cache_len=max_cache_len, sliding_window=layer.max_cache_len)
    raise ModelConfigError(
        f"layer {index} has KV-cache scales, and its cache, {type(layer).__name__}, has no static int8 form",
        tensor="k_cache_scale",
    )


def make_static_cache(model: PreTrainedModel, max_cache_len: int) -> StaticCache:
    """An empty static cache of the kind the model generates with: `Int8StaticCache`, or transformers' own."""
    if getattr(model, "bytelane_kv_cache", "float") == "int8":
        return Int8StaticCache(model.config, kv_scales(model), max_cache_len)
    return StaticCache(config=model.config, max_cache_len=max_cache_len)
