"""Decoding one sequence on a GPU as a CUDA graph: one launch a token instead of some thousand, with nothing to compile.

    graph = StepGraph(model, 1024)
    logits = graph.read(prompt)                     # [vocabulary], after the prompt
    for _ in range(200):
        logits = graph.step(int(logits.argmax()))

Eager decoding is launch-bound: the host takes ten times as long to launch a token's kernels as the GPU to run them. A
captured step is replayed without the host. transformers' own way to a graph goes through `torch.compile`, minutes for a
large model; this one captures the model's forward as it is, in the time of two tokens, so the bits are the eager ones
of a cache of the same length.

Everything that changes from token to token lives in tensors the step itself writes: the token, its position, the
cache's length. Sliding-window layers therefore keep the whole length, and a mask hides what has left the window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from bytelane.cache import cache_keyword
from bytelane.decoder.parts import is_decoder
from bytelane.errors import ModelConfigError
from bytelane.static_cache import Int8StaticLayer, make_static_cache


def _whole_length(model: PreTrainedModel, length: int) -> Cache:
    """A static cache none of whose layers slides: places are positions."""
    cache = make_static_cache(model, length)
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False):
            scales = getattr(layer, "scales", None)
            whole = StaticLayer(length) if scales is None else Int8StaticLayer(scales, max_cache_len=length)
            cache.layers[index] = whole
    return cache


class StepGraph:
    """One sequence's decoding step, captured; elsewhere than on CUDA the same step, called.

    Attributes:
        cache: what it has read.
        length: positions in it.
        used: of them, those that hold a token.
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        """Make an empty cache of a fixed length.

        Args:
            model: as `load_model` returns it, on its device.
            length: positions, prompt and answer together. Every step reads all of them.

        Raises:
            ModelConfigError: a model whose masks and positions this does not know.
        """
        decoder: Any = model.get_decoder()
        text: Any = model
        if not is_decoder(decoder) or getattr(text, "model", None) is not decoder:
            raise ModelConfigError(
                f"{type(decoder).__name__} is not an architecture whose decoding step can be captured",
                tensor=type(model).__name__,
            )
        config = model.config.get_text_config()
        kinds: list[str] | None = getattr(config, "layer_types", None)
        self._window: int | None = getattr(config, "sliding_window", None)
        # Llama's own layer types are of other models' making: it takes one mask
        self._by_kind = kinds is not None and "sliding_attention" in kinds and self._window is not None
        self._model: Any = model
        self.length = length
        self.cache = _whole_length(model, length)
        device = model.device
        self._places = torch.arange(length, device=device)
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._position = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.used = 0

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        seen = self._places[None, None, None, :] <= positions[:, None, :, None]
        mask: Any = seen
        if self._by_kind:
            assert self._window is not None
            near = self._places[None, None, None, :] > positions[:, None, :, None] - self._window
            mask = {"full_attention": seen, "sliding_attention": seen & near}
        given = {cache_keyword(self._model): self.cache, "use_cache": True, "logits_to_keep": 1}
        found: Tensor = self._model(ids, attention_mask=mask, position_ids=positions, **given).logits
        return found[0, -1]

    def _step(self) -> Tensor:
        logits = self._forward(self._token, self._position)
        self._position.add_(1)
        return logits

    def _room(self, tokens: int) -> None:
        if self.used + tokens > self.length:
            raise ValueError(f"{self.used} of {self.length} positions are used, {tokens} more do not fit")

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Read tokens `[n]` after those in the cache; logits `[vocabulary]` after the last of them."""
        self._room(ids.numel())
        ids = ids.reshape(1, -1).to(self._model.device)
        positions = self._places[None, self.used : self.used + ids.shape[1]]
        logits = self._forward(ids, positions)
        self.used += ids.shape[1]
        self._position.fill_(self.used)
        return logits

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Run one token; logits `[vocabulary]`, which the next step overwrites."""
        self._room(1)
        self._token.fill_(token)
        if self._model.device.type != "cuda":
            self._logits = self._step()
        elif self._graph is None:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        self.used += 1
        assert self._logits is not None
        return self._logits

    def _capture(self) -> None:
        """Capture the step; the cache is as before, ready for the first replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # once to compile and to allocate; a place written before its time is written again
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._position.fill_(self.used)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.used)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph = graph
