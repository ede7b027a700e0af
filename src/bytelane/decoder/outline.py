"""What a step of one token needs of a model beside its layers: caches, angles, the way in and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bytelane.decoder.parts import Parts


@dataclass(frozen=True)
class Place:
    """Which cache layer a decoder layer reads, whether it writes it, and which angles turn its heads.

    Attributes:
        layer: index of the cache layer.
        writes: False for a layer that reuses another one's keys and values.
        angles: index into `Outline.angles`.
        window: how many keys a query sees, its own among them; 0 for all.
    """

    layer: int
    writes: bool
    angles: int
    window: int = 0


class Outline:
    """A model around its decoder layers, by its own modules.

    Attributes:
        places: one for each decoder layer.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Parts]) -> None:
        self._model: Any = model
        self._text: Any = model.get_decoder()
        # one table of angles for all layers, or one for each kind of layer
        by_kind = hasattr(self._text.rotary_emb, "layer_types")
        attention: list[Any] = [parts.attention for parts in layers]
        kinds: list[str | None] = [module.layer_type if by_kind else None for module in attention]
        self._kinds = list(dict.fromkeys(kinds))
        stored: dict[str | None, int] = {}
        self.places: list[Place] = []
        for parts, kind in zip(layers, kinds, strict=True):
            angles = self._kinds.index(kind)
            window = int(getattr(parts.attention, "sliding_window", None) or 0)
            if parts.k is None:
                self.places.append(Place(stored[parts.shares], False, angles, window))
                continue
            self.places.append(Place(parts.layer_idx, True, angles, window))
            if parts.stores:
                stored[parts.shares] = parts.layer_idx
        config = self._model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._per_layer = layers[0].per_layer is not None

    def embed(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens `[1, 1]` to the stream `[1, 1, hidden]`, and Gemma 4's inputs `[1, 1, layers, width]` or None."""
        x = self._text.embed_tokens(ids)
        if not self._per_layer:
            return x, None
        return x, self._text.project_per_layer_inputs(x, self._text.get_per_layer_inputs(ids, x)).contiguous()

    def angles(self, x: Tensor, position: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of a position `[1, 1]`, in the dtype of `x`, for each kind of layer."""
        rotary = self._text.rotary_emb
        found = [rotary(x, position) if kind is None else rotary(x, position, kind) for kind in self._kinds]
        return [(cosine.contiguous(), sine.contiguous()) for cosine, sine in found]

    def norm(self, y: Tensor) -> Tensor:
        """The last norm, of the stream after all layers."""
        normal: Tensor = self._text.norm(y)
        return normal

    def logits(self, y: Tensor) -> Tensor:
        """Logits `[vocabulary]` of the normalized stream `[1, 1, hidden]`."""
        logits: Tensor = self._model.get_output_embeddings()(y)[0, 0]
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits
