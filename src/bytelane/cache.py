"""The int8 KV cache: what the phone's attention reads.

A checkpoint may carry two static scales per attention layer. Keys (after their norm and rotation) and values (after
their norm) are quantized when they are written to the cache, and attention reads what was written:

    c = clamp(rne(f32(x) * f32(1 / s)), -128, 127)        at write, `torch.ops.bytelane.quantize`
    y = f32(c) * s, cast to the dtype of x                 at read, one rounding to float32 and one to the dtype

The tokens of the current call take the same way: they are written, then read. So a key has one value whether the query
that meets it comes in the same call or a thousand tokens later, and cutting a prompt into pieces changes no key.

`Int8Cache` is transformers' `DynamicCache` with another kind of layer in it, whose `keys` and `values` are codes.
Mask sizes, beams, cropping and batches are transformers' own, which only slice and index what a layer holds. Writing is
not: where transformers concatenates, and so copies the whole cache for every token, the layers here write into spare
room behind the tokens they hold. bytelane's own decoder layers read the codes in place (`write`); others get them
dequantized (`update`). Layers that reuse another layer's keys and values (Gemma 4's later ones) have nothing to store.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from bytelane import ops as _ops  # noqa: F401  (registers torch.ops.bytelane)
from bytelane.checkpoint import KVScales
from bytelane.dispatch import FLOATS, machine
from bytelane.errors import MissingTensorError, ModelConfigError
from bytelane.kernels import float_ops
from bytelane.kernels.float_ops import KeyValues
from bytelane.scheme import Numerics

KVCacheChoice = Literal["auto", "int8", "float"]
"""`auto` is `int8` where the numerics are integer and the checkpoint has the scales, else `float`."""


def append(held: Tensor, new: int, room: Tensor | None, spare: int) -> tuple[Tensor, Tensor]:
    """Make place for new tokens behind the tokens a layer holds.

    Args:
        held: `[batch, heads, tokens, dim]`, the tokens so far: a view of `room`, or anything else.
        new: how many tokens come.
        room: the tensor earlier calls returned, or None.
        spare: how many more tokens a new room is made for.

    Returns:
        The room, and its part that begins with the held tokens and ends with the places of the new ones. Held tokens
        are copied only when the room is full or they are not in it (after a beam's reordering, say).
    """
    batch, heads, tokens, dim = held.shape
    if room is not None and held.dtype is room.dtype and held.data_ptr() and held.stride()[:3] == room.stride()[:3]:
        start, inside = divmod(int(held.storage_offset()), dim)
        here = held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr() and not inside
        if here and held.shape[:2] == room.shape[:2] and start + tokens + new <= room.shape[2]:
            return room, room[:, :, start : start + tokens + new]
    room = held.new_empty(batch, heads, tokens + new + spare, dim)
    room[:, :, :tokens] = held
    return room, room[:, :, : tokens + new]


class _Storage(DynamicLayer):
    """A layer that grows in place. With scales its keys and values are codes, without them floats as they come."""

    def __init__(self, scales: KVScales | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scales = scales
        self.key_scale = None if scales is None else torch.tensor(scales.k, dtype=torch.float32)
        self.value_scale = None if scales is None else torch.tensor(scales.v, dtype=torch.float32)
        self._rooms: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, on the device of the states; int8 where there are scales, else in their dtype."""
        self.device = key_states.device
        dtype = key_states.dtype if self.scales is None else torch.int8
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], 0, states.shape[-1]), dtype=dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True
        if self.key_scale is not None and self.value_scale is not None:
            self.key_scale, self.value_scale = self.key_scale.to(self.device), self.value_scale.to(self.device)

    def _spare(self, tokens: int) -> int:
        """Room to make beside what is needed: as much again, so that each token is copied about once."""
        return max(tokens, 64)

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """Note which tokens stay."""
        self.keys, self.values = keys, values

    def reserve(self, new: int) -> tuple[Tensor, Tensor]:
        """Count new tokens as written; the caller fills in their places, which come last.

        Args:
            new: how many tokens; the layer is initialized.

        Returns:
            Keys and values `[batch, KV heads, tokens, head dim]` of all tokens that attention may look at: the layer's
            own memory, to be read before the next write.
        """
        tokens = self.keys.shape[-2]
        rooms = self._rooms or (None, None)
        key_room, keys = append(self.keys, new, rooms[0], self._spare(tokens + new))
        value_room, values = append(self.values, new, rooms[1], self._spare(tokens + new))
        self._rooms = key_room, value_room
        self._keep(keys, values)
        return keys, values

    def write(self, key_states: Tensor, value_states: Tensor) -> KeyValues:
        """Write the states of new tokens.

        Args:
            key_states: `[batch, KV heads, new tokens, head dim]`, float32, bfloat16 or float16.
            value_states: likewise.

        Returns:
            All that attention may look at, as it is stored; see `reserve`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        keys, values = self.reserve(new)
        for states, scale, kept in ((key_states, self.key_scale, keys), (value_states, self.value_scale, values)):
            places = kept[:, :, kept.shape[2] - new :]
            if scale is None:
                places.copy_(states)
            else:
                _quantize_into(states, scale, places)
        return KeyValues(keys, values, self.key_scale, self.value_scale)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens, then read all that attention may look at.

        Args:
            key_states: `[batch, KV heads, new tokens, head dim]`, float32, bfloat16 or float16.
            value_states: likewise.
            args: of other kinds of cache; not used.
            kwargs: likewise.

        Returns:
            Keys and values `[batch, KV heads, visible tokens, head dim]` as floats of the dtype of the states.
        """
        return self.write(key_states, value_states).floats(key_states.dtype)

    def reset(self) -> None:
        """Forget all tokens."""
        # Before transformers 5.23 the base class zeroed its tensors and kept their length: a cache of zeros that
        # attention would look at. Dropping them first is right for those and changes nothing for later ones.
        held: Any = self
        held.keys = held.values = None
        self._rooms = None
        self.is_initialized = False
        super().reset()


class GrowingLayer(_Storage, DynamicLayer):
    """A full-attention layer: `keys` and `values` are `[batch, KV heads, tokens, head dim]`."""


class GrowingSlidingWindowLayer(_Storage, DynamicSlidingWindowLayer):
    """A sliding-window layer: the same, of the last `sliding_window - 1` tokens."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty."""
        super().lazy_initialization(key_states, value_states)
        self._sliding_window_tensor = torch.tensor(self.sliding_window, device=self.device)

    def _spare(self, tokens: int) -> int:
        return min(max(tokens, 64), int(self.sliding_window))

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        # As the base class does: all tokens while the past is recorded, and `crop` cuts them to the window.
        self.cumulative_length += keys.shape[-2] - self.keys.shape[-2]
        first = 0 if self.record_past else max(keys.shape[-2] - self.sliding_window + 1, 0)
        super()._keep(keys[:, :, first:], values[:, :, first:])


class Int8Layer(GrowingLayer):
    """A full-attention layer of int8 codes."""


class Int8SlidingWindowLayer(GrowingSlidingWindowLayer):
    """A sliding-window layer of int8 codes."""


def grows(layer: Any) -> TypeGuard[_Storage]:
    """Whether a cache layer is one of bytelane's, which grow in place."""
    return isinstance(layer, _Storage)


def _quantize_into(states: Tensor, scale: Tensor, codes: Tensor) -> None:
    """The codes of `states` into `codes`, both `[batch, heads, tokens, dim]`."""
    if states.is_cpu and states.dtype in FLOATS:
        float_ops.store_codes(states, scale, codes, isa=machine().isas[0])
    else:
        codes.copy_(torch.ops.bytelane.quantize(states, scale))


class GrowingCache(DynamicCache):
    """transformers' `DynamicCache`, its layers growing in place. Kinds of layer that have no such form are its own."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Make an empty cache for a model's configuration."""
        super().__init__(config=config)
        made: Any = self
        made.layers = [_growing_layer(layer, None) or layer for layer in made.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, of all layers."""
        return cache_bytes(self)


class Int8Cache(GrowingCache):
    """A cache for one model that stores int8 codes wherever the checkpoint has scales for it.

    Use it as any transformers cache: `model.generate(ids, cache=Int8Cache(model.config, scales))` (before transformers
    5.24 the argument is `past_key_values`). Layers without scales are float. Iterating over it gives codes, not floats.
    """

    def __init__(self, config: PretrainedConfig, scales: Mapping[int, KVScales]) -> None:
        """Make an empty cache.

        Args:
            config: the model's configuration.
            scales: by index of the decoder layer. Scales of a layer that reuses another one's keys and values are
                ignored: it writes nothing.

        Raises:
            ModelConfigError: scales for a layer the model does not have, or whose cache is of a kind that has no int8
                form (linear attention, sparse attention with an indexer).
        """
        super().__init__(config)
        depth = config.get_text_config(decoder=True).num_hidden_layers
        for index, layer_scales in scales.items():
            if not 0 <= index < depth:
                raise ModelConfigError(f"KV-cache scales for layer {index} of {depth}", tensor="k_cache_scale")
            # Layers that reuse keys and values come last; transformers before 5.23 makes no cache layer for them.
            if index < len(self.layers):
                self.layers[index] = _int8_layer(self.layers[index], layer_scales, index)


def _growing_layer(layer: Any, scales: KVScales | None) -> Any:
    """The layer's growing form, or None."""
    # The exact types: a subclass holds more than keys and values, and these would be only half of its state.
    if type(layer) in (DynamicLayer, GrowingLayer):
        return (GrowingLayer if scales is None else Int8Layer)(scales)
    if type(layer) in (DynamicSlidingWindowLayer, GrowingSlidingWindowLayer):
        kind = GrowingSlidingWindowLayer if scales is None else Int8SlidingWindowLayer
        return kind(scales, sliding_window=layer.sliding_window)
    return None


def _int8_layer(layer: Any, scales: KVScales, index: int) -> Any:
    made = _growing_layer(layer, scales)
    if made is not None:
        return made
    if not hasattr(layer, "get_mask_sizes") and layer.keys is None:
        return layer
    raise ModelConfigError(
        f"layer {index} has KV-cache scales, and its cache, {type(layer).__name__}, has no int8 form",
        tensor="k_cache_scale",
    )


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values a cache holds. Memory a window was cut from is given back at the next token."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def rewind(cache: Cache, length: int) -> bool:
    """Cut a cache back to its first `length` tokens.

    Returns:
        False, with the cache untouched, when it cannot be: a sliding window has dropped tokens that would be back in
        view, or a layer keeps a running state. The caller then starts over with an empty cache.
    """
    remove = cache.get_seq_length() - length
    if remove < 0:
        raise ValueError(f"a cache of {cache.get_seq_length()} tokens cannot be cut to {length}")
    if remove == 0:
        return True
    if not all(_keeps_all(layer) for layer in cache.layers):
        return False
    cache.crop(-remove)
    return True


def _keeps_all(layer: Any) -> bool:
    """Whether a layer still holds every token it was given."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return False
    return not isinstance(layer, DynamicSlidingWindowLayer) or layer.get_seq_length() < layer.sliding_window


# --- models ------------------------------------------------------------------------------------------------------


def install_kv_cache(
    model: PreTrainedModel,
    scales: Mapping[str, KVScales],
    *,
    choice: KVCacheChoice = "auto",
    numerics: Numerics = Numerics.INTEGER,
    file: Path | None = None,
) -> None:
    """Note a checkpoint's KV-cache scales on its model, and make `generate` use the int8 cache where it should.

    Sets `model.bytelane_kv_scales` (`dict[int, KVScales]`, by decoder layer, what the checkpoint has) and
    `model.bytelane_kv_cache` (`"int8"` or `"float"`, what `generate` and `make_cache` use).

    Args:
        model: the model.
        scales: by name of the attention module.
        choice: what the user asked for.
        numerics: of the model's layers.
        file: the checkpoint, for errors.

    Raises:
        ValueError: an unknown choice.
        MissingTensorError: `int8` without scales.
        ModelConfigError: scales of a module that is no decoder layer's attention, or as for `Int8Cache`.
    """
    if choice not in get_args(KVCacheChoice):
        raise ValueError(f"kv_cache must be one of {', '.join(get_args(KVCacheChoice))}, found {choice!r}")
    if choice == "int8" and not scales:
        raise MissingTensorError(
            "kv_cache='int8' needs the checkpoint's KV-cache scales, and it has none", file=file, tensor="k_cache_scale"
        )
    by_index = _by_layer(model, scales, file)
    int8 = choice == "int8" or (choice == "auto" and numerics is Numerics.INTEGER and bool(scales))
    state: Any = model
    state.bytelane_kv_scales = by_index
    state.bytelane_kv_cache = "int8" if int8 else "float"
    if int8:
        make_cache(model)  # refuses here, not in the middle of the first generation, what has no int8 form
        # transformers has no registry for caches: `cache_implementation` takes names from a closed list, and the hook
        # that makes the cache is private. The documented way is to pass a cache, so the model's own `generate` does
        # that when the caller does not. On the instance, and as a bound method: the class is shared with other models,
        # and a deep copy binds its own `generate` to itself.
        state.generate = types.MethodType(_generate_with_int8_cache, model)


def _by_layer(model: PreTrainedModel, scales: Mapping[str, KVScales], file: Path | None) -> dict[int, KVScales]:
    """Scales by the index that the attention module passes to `Cache.update`."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    found: dict[int, KVScales] = {}
    for name, layer_scales in scales.items():
        module = model.get_submodule(name)
        index = getattr(module, "layer_idx", None)
        if id(module) not in decoder or not isinstance(index, int):
            raise ModelConfigError(
                "KV-cache scales belong to the attention modules of the decoder", file=file, tensor=name
            )
        found[index] = layer_scales
    return found


@functools.cache
def _cache_keyword(model_class: Hashable) -> str:
    forward: Any = getattr(model_class, "forward")  # noqa: B009  (a class, which mypy does not take for hashable)
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_keyword(model: PreTrainedModel) -> str:
    """What the installed transformers calls the cache, in arguments and in outputs.

    `cache`, or `past_key_values` before 5.24.
    """
    return _cache_keyword(model.__class__)


def kv_scales(model: PreTrainedModel) -> dict[int, KVScales]:
    """The KV-cache scales of the checkpoint a model was loaded from, by decoder layer; empty if it had none."""
    return dict(getattr(model, "bytelane_kv_scales", {}))


def make_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kind the model generates with: an `Int8Cache`, or a float one."""
    if getattr(model, "bytelane_kv_cache", "float") == "int8":
        return Int8Cache(model.config, kv_scales(model))
    return GrowingCache(model.config)


@functools.wraps(GenerationMixin.generate)
def _generate_with_int8_cache(
    self: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    def setting(name: str) -> Any:
        """As `generate` resolves it: the call's arguments, its configuration, the model's configuration."""
        given = (kwargs.get(name), getattr(generation_config, name, None), getattr(self.generation_config, name, None))
        return next((value for value in given if value is not None), None)

    # "hybrid" is an old name for the default that Gemma checkpoints still carry; `generate` reads it as none, too.
    asked = setting("cache_implementation") not in (None, "hybrid")
    given = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
    if not given and setting("use_cache") is not False and not asked:
        cache = make_cache(self)
        kwargs.pop("past_key_values", None)  # None, and beside the other name transformers warns of it all the same
        if setting("is_assistant"):
            # As `generate` does with a cache of its own making: the candidates' tokens will be taken back.
            cache.activate_past_recording()
        kwargs[cache_keyword(self)] = cache
    return type(self).generate(self, inputs, generation_config, *args, **kwargs)
