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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from bytelane import _native
from bytelane.cache import GrowingCache, grows
from bytelane.decoder.forward import LayerForward
from bytelane.decoder.native import NativeLayer
from bytelane.decoder.parts import is_decoder


@dataclass(frozen=True)
class _Place:
    """Which cache layer a decoder layer reads, and whether it writes it."""

    layer: int
    writes: bool
    angles: int
    sliding: bool = False


class DecodeStack:
    """A model's decoder layers as one, as they are now."""

    def __init__(self, model: PreTrainedModel, layers: list[NativeLayer], owners: list[LayerForward]) -> None:
        self._model: Any = model
        self._layers = layers
        self._stack = _native.LayerStack()
        for layer in layers:
            self._stack.add(layer.run)
        self._text: Any = model.get_decoder()
        # one table of angles for all layers, or one for each kind of layer
        by_kind = hasattr(self._text.rotary_emb, "layer_types")
        attention: list[Any] = [own.parts.attention for own in owners]
        kinds: list[str | None] = [module.layer_type if by_kind else None for module in attention]
        self._angle_kinds = list(dict.fromkeys(kinds))
        stored: dict[str | None, int] = {}
        self._places: list[_Place] = []
        for own, kind in zip(owners, kinds, strict=True):
            parts, angles = own.parts, self._angle_kinds.index(kind)
            if parts.k is None:
                self._places.append(_Place(stored[parts.shares], False, angles))
                continue
            sliding = getattr(parts.attention, "sliding_window", None) is not None
            self._places.append(_Place(parts.layer_idx, True, angles, sliding))
            if parts.stores:
                stored[parts.shares] = parts.layer_idx
        config = self._model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._per_layer = owners[0].parts.per_layer is not None

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
        for place in self._places:
            if not place.writes:
                continue
            layer: Any = cache.layers[place.layer]
            if not grows(layer) or not layer.is_initialized or not layer.keys.is_cpu or layer.keys.shape[0] != 1:
                return False
            if layer.is_sliding != place.sliding or getattr(layer, "record_past", False):
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
        text, model = self._text, self._model
        position = torch.tensor([[cache.get_seq_length()]])
        ids = torch.tensor([[token]])
        x = text.embed_tokens(ids)
        per_layer = None
        if self._per_layer:
            per_layer = text.project_per_layer_inputs(x, text.get_per_layer_inputs(ids, x)).contiguous()
        angles = [self._angles(x, position, kind) for kind in self._angle_kinds]
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
        logits: Tensor = model.get_output_embeddings()(text.norm(y))[0, 0]
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def _angles(self, x: Tensor, position: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        rotary = self._text.rotary_emb
        cosine, sine = rotary(x, position) if kind is None else rotary(x, position, kind)
        return cosine.contiguous(), sine.contiguous()

    def _slots(self, cache: Any) -> array[int]:
        """The rows of `LayerStack.step`; counts the token as written in every layer."""
        rows: dict[int, tuple[int, ...]] = {}
        fields: list[int] = []
        for place in self._places:
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
