"""Decoding one sequence on a GPU as a CUDA graph: one launch a token instead of some thousand, with nothing to compile.

    graph = StepGraph(model, 1024)
    logits = graph.read(prompt)                     # [vocabulary], after the prompt
    for _ in range(200):
        logits = graph.step(int(logits.argmax()))

Eager decoding is launch-bound: the host takes ten times as long to launch a token's kernels as the GPU to run them. A
captured step is replayed without the host. transformers' own way to a graph goes through `torch.compile`, minutes for a
large model; this one captures the model's forward as it is, in the time of two tokens, so the bits are the eager ones
of a cache of the same length.

Where every projection is one of bytelane's, the step is not transformers' forward but `decoder.token_step`, with a
quarter of the launches. Prompts are read by the model's own forward, into the same cache.

Everything that changes from token to token lives in tensors the step itself writes: the token, its position, the
cache's length. Sliding-window layers therefore keep the whole length, and a mask hides what has left the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from bytelane.cache import cache_keyword
from bytelane.decoder.parts import is_decoder
from bytelane.errors import ModelConfigError
from bytelane.kernels import gpu
from bytelane.layers import QuantLinear
from bytelane.scheme import Numerics
from bytelane.static_cache import Int8StaticLayer, make_static_cache

if TYPE_CHECKING:
    from bytelane.decoder.token_step import TokenStep


def unknown_step(model: PreTrainedModel) -> str | None:
    """Why a model's masks and positions are not known to `StepGraph`; None when they are."""
    decoder: Any = model.get_decoder()
    if not is_decoder(decoder) or getattr(model, "model", None) is not decoder:
        return f"{type(decoder).__name__} is not an architecture whose decoding step can be captured"
    return None


def refusal(model: PreTrainedModel) -> str | None:
    """Why `generate` and chats do not decode this model by `StepGraph`; None when they do.

    The rule: a model on a CUDA device, of a known architecture, whose linear layers all compute in integers. The
    emulated numerics run operation by operation and are there to be compared with, so they stay eager.
    """
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}: steps are captured on cuda"
    if any(isinstance(m, QuantLinear) and m.numerics is not Numerics.INTEGER for m in model.modules()):
        return "emulated numerics are not captured"
    return unknown_step(model)


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
        if (reason := unknown_step(model)) is not None:
            raise ModelConfigError(reason, tensor=type(model).__name__)
        config = model.config.get_text_config()
        kinds: list[str] | None = getattr(config, "layer_types", None)
        self._window: int | None = getattr(config, "sliding_window", None)
        # Llama's own layer types are of other models' making: it takes one mask
        self._by_kind = kinds is not None and "sliding_attention" in kinds and self._window is not None
        self._model: Any = model
        self.length = length
        self.cache = _whole_length(model, length)
        device = model.device
        self._chain: TokenStep | None = None
        if gpu.runs_on(device):
            from bytelane.decoder.token_step import token_step  # it imports Triton

            self._chain = token_step(model)
        self._places = torch.arange(length, device=device)
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._position = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.used = 0

    @torch.inference_mode()
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens: no place is ever dropped, so any of them can be the last.

        Raises:
            ValueError: fewer tokens are held.
        """
        if not 0 <= length <= self.used:
            raise ValueError(f"{self.used} tokens are held, the first {length} cannot be kept")
        self._go_to(length)

    @torch.inference_mode()
    def grow(self, length: int) -> None:
        """Make room for more positions; what was read is kept, and the step is captured anew when it is next run.

        Raises:
            ValueError: fewer positions than there are.
        """
        if length < self.length:
            raise ValueError(f"{self.length} positions cannot become {length}")
        before, self.cache = self.cache, _whole_length(self._model, length)
        self._graph, self._logits = None, None
        self.length = length
        self._places = torch.arange(length, device=self._model.device)
        for new, held in zip(self.cache.layers, before.layers, strict=True):
            if isinstance(held, StaticLayer) and held.is_initialized:
                layer: Any = new
                layer.lazy_initialization(held.keys, held.values)
                layer.keys[:, :, : self.used].copy_(held.keys[:, :, : self.used])
                layer.values[:, :, : self.used].copy_(held.values[:, :, : self.used])
        self._go_to(self.used)

    def _go_to(self, used: int) -> None:
        self.used = used
        self._position.fill_(used)
        for layer in self.cache.layers:
            if isinstance(layer, StaticLayer) and layer.is_initialized:
                layer.cumulative_length.fill_(used)

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
        if self._chain is None:
            logits = self._forward(self._token, self._position)
        else:
            logits = self._chain(self._token, self._position, self.cache)
        self._position.add_(1)
        return logits

    def _room(self, tokens: int) -> None:
        if self.used + tokens > self.length:
            raise ValueError(f"{self.used} of {self.length} positions are used, {tokens} more do not fit")

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Read tokens `[n]` after those in the cache; logits `[vocabulary]` after the last of them."""
        self._room(ids.numel())
        self._go_to(self.used)  # a chain of launches leaves the cache's own count as it is
        ids = ids.reshape(1, -1).to(self._model.device)
        positions = self._places[None, self.used : self.used + ids.shape[1]]
        logits = self._forward(ids, positions)
        self.used += ids.shape[1]
        self._position.fill_(self.used)
        return logits

    @torch.inference_mode()
    def call(self, token: int) -> Tensor:
        """`step`, called operation by operation instead of captured."""
        self._room(1)
        self._token.fill_(token)
        logits = self._step()
        self.used += 1
        return logits

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Run one token; logits `[vocabulary]`, which the next step overwrites."""
        if self._model.device.type != "cuda":
            return self.call(token)
        self._room(1)
        self._token.fill_(token)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        self.used += 1
        return self._logits

    def _capture(self) -> None:
        """Capture the step; the cache is as before, ready for the first replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # once to compile and to allocate; a place written before its time is written again
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._go_to(self.used)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph = graph
