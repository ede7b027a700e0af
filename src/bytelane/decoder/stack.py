"""One token of one sequence through all decoder layers in one native call.

A decode step through transformers' model code costs some milliseconds of Python: a call for each layer with a dozen
arguments, configuration look-ups, masks that hide nothing. `DecodeStack.step` does what that code does for a single new
token (embed it, make its angles, run the layers, normalize, project to logits, soft-cap), with the model's own modules
and the same kernels, so the logits are the same bits. `bytelane.generation` uses it; `model.generate` and every other
way into the model keep transformers' code.

A stack is for one generation: it holds the layers as they are when it is made. It is for models whose every decoder
layer is native, and for caches that grow in place.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from bytelane import _native
from bytelane.cache import GrowingCache, grows
from bytelane.decoder.forward import LayerForward
from bytelane.decoder.native import NativeLayer
from bytelane.decoder.outline import Outline
from bytelane.decoder.parts import is_decoder


class DecodeStack:
    """A model's decoder layers as one, as they are now."""

    def __init__(self, model: PreTrainedModel, layers: list[NativeLayer], owners: list[LayerForward]) -> None:
        self._layers = layers
        self._stack = _native.LayerStack()
        for layer in layers:
            self._stack.add(layer.run)
        self._outline = Outline(model, [own.parts for own in owners])

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecodeStack | None:
        """The stack of a model, or None where a decoder layer has no native form now."""
        decoder: Any = model.get_decoder()
        owners: list[LayerForward] = []
        natives: list[NativeLayer] = []
        for layer in getattr(decoder, "layers", ()):
            own: LayerForward | None = getattr(layer, "bytelane_forward", None)
            native = own.native(model.dtype) if own is not None and own.unwatched() else None
            if own is None or native is None or layer._forward_hooks or layer._forward_pre_hooks:
                return None
            owners.append(own)
            natives.append(native)
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in (model, decoder))
        if not natives or watched or not is_decoder(decoder) or model.device.type != "cpu":
            return None
        return cls(model, natives, owners)

    def takes(self, cache: Cache) -> bool:
        """Whether a cache has begun, and holds one sequence in layers that grow in place and keep what a query sees."""
        if not isinstance(cache, GrowingCache):
            return False
        for place in self._outline.places:
            if not place.writes:
                continue
            layer: Any = cache.layers[place.layer]
            if not grows(layer) or not layer.is_initialized or not layer.keys.is_cpu or layer.keys.shape[0] != 1:
                return False
            if layer.is_sliding != (place.window > 0) or getattr(layer, "record_past", False):
                return False
        return True

    @torch.inference_mode()
    def step(self, token: int, cache: Cache) -> Tensor:
        """Run one token.

        Args:
            token: the token after those in the cache.
            cache: as `takes` wants it; it holds the token afterwards.

        Returns:
            Logits `[vocabulary]` in the activation dtype.
        """
        position = torch.tensor([[cache.get_seq_length()]])
        x, per_layer = self._outline.embed(torch.tensor([[token]]))
        angles = self._outline.angles(x, position)
        slots = self._slots(cache)
        addresses = array("q", [a.data_ptr() for pair in angles for a in pair])
        y = torch.empty_like(x)
        self._stack.step(
            x.data_ptr(),
            slots.buffer_info()[0],
            len(self._layers),
            addresses.buffer_info()[0],
            len(angles),
            0 if per_layer is None else per_layer.data_ptr(),
            0 if per_layer is None else per_layer.shape[-1],
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return self._outline.logits(self._outline.norm(y))

    def _slots(self, cache: Any) -> array[int]:
        """The rows of `LayerStack.step`; counts the token as written in every layer."""
        rows: dict[int, tuple[int, ...]] = {}
        fields: list[int] = []
        for place in self._outline.places:
            if place.writes:
                layer = cache.layers[place.layer]
                keys, values = layer.reserve(1)
                scales = layer.key_scale, layer.value_scale
                rows[place.layer] = (
                    keys.data_ptr(),
                    values.data_ptr(),
                    *(0 if scale is None else scale.data_ptr() for scale in scales),
                    keys.stride(1),
                    values.stride(1),
                    keys.shape[2],
                )
            fields += rows[place.layer]
            fields.append(place.angles)
        return array("q", fields)
