"""Ranges by task loss, for the few tensors whose loudest value says nothing about the rest.

A first token's massive activations are hundreds of times what other tokens have, and the model needs them: clipped to a
percentile, attention loses its sink; covered, all other tokens lose their steps. No statistic of the tensor alone finds
the range between, so it is tried out. The sides are ordered by `amax / percentile(99)`, the loudest are set free (a
float side), and in the model's order each is given the range under which the simulated model's loss is least, with the
sides before it as chosen: of `CANDIDATES` ranges, spread evenly in the logarithm from that percentile to amax. Ranges
depend on each other (an input that clips a massive activation leaves less of it in the output), so a second sweep tries
them again with all others as chosen, against the ranges halfway to the next candidates. (In windows of 512 tokens the
first tokens are 0.2 % of all values: the percentile must leave out more than that.) The layers before the one in
question are not run again.

The loss is what the float model's next-token distribution p has over the simulated one's q,

    KL = sum_v p_v (log p_v - log q_v)         nats a token, mean over positions but each window's first

Its noise is far below that of the text's own likelihood, whose mean it moves by as much: no drawing of a next token is
in it, and it is 0 where nothing is lost. The first position is left out because the massive activation is its own: what
it predicts depends on how exactly the last layers take that activation out again, by ten nats and more, and would
decide over the whole window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.quantize.layerwise import advance, decoder_layers, entered_at, first_hidden, layer_calls
from bytelane.quantize.observe import CODE_MAX, Observations, Statistics
from bytelane.quantize.simulate import Simulation

CANDIDATES = 6
TRIED = CANDIDATES + 3
"""Ranges tried for a tensor in two sweeps, at most."""
QUIET = 99.0
"""Percentile that stands for the ordinary values of a tensor, and the narrowest range tried."""


@dataclass(frozen=True)
class Choice:
    """One side's range, chosen by loss.

    Attributes:
        names: the layers: one, or all that read the tensor.
        side: `"input"` or `"output"`.
        limit: the end of the range.
        losses: the divergence in nats a token under each range of the second sweep, by its end.
    """

    names: tuple[str, ...]
    side: str
    limit: float
    losses: Mapping[float, float]


def loudness(statistics: Statistics) -> float:
    """`amax / percentile(99)`, infinite where the percentile is 0; needs a histogram."""
    quiet = statistics.percentile(QUIET)
    return statistics.amax() / quiet if quiet > 0 else math.inf


def candidates(statistics: Statistics) -> list[float]:
    """The ends of the ranges to try first, ascending."""
    top = statistics.amax()
    bottom = max(statistics.percentile(QUIET), top / 1e4)
    return [bottom * (top / bottom) ** (i / (CANDIDATES - 1)) for i in range(CANDIDATES)]


def _spacing(statistics: Statistics) -> float:
    """The ratio of one candidate to the one before."""
    first, second, *_ = candidates(statistics)
    return second / first


def _around(limit: float, statistics: Statistics) -> list[float]:
    """A range, and those halfway to the candidates next to it, none wider than what was seen."""
    half = math.sqrt(_spacing(statistics))
    return sorted({limit / half, limit, min(limit * half, statistics.amax())})


_REFERENCE_VALUES = 1 << 26
"""float32 log-probabilities of the float model held at a time; of more positions, evenly spaced ones are kept."""


class Divergence:
    """KL divergence of a model's next-token distributions from what they were when this was made.

    Args:
        model: the model as it is now.
        windows: int64 `[length]` token ids each.
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows: Sequence[Tensor]) -> None:
        self._model = model
        self._windows = windows
        vocabulary = model.get_output_embeddings().weight.shape[0]
        positions = sum(window.numel() for window in windows)
        self._every = max(1, math.ceil(positions * vocabulary / _REFERENCE_VALUES))
        self._held = [self._log_probabilities(window) for window in windows]

    def _log_probabilities(self, window: Tensor) -> Tensor:
        logits = self._model(input_ids=window[None], use_cache=False).logits[0, 1 :: self._every]
        return torch.log_softmax(logits.to(torch.float32), dim=-1)

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean over the positions kept, in nats; infinite where the model gives NaN."""
        total = 0.0
        for window, held in zip(self._windows, self._held, strict=True):
            found = self._log_probabilities(window)
            total += float((held.exp() * (held - found)).sum(dtype=torch.float64))
        mean = total / sum(held.shape[0] for held in self._held)
        return mean if math.isfinite(mean) else math.inf


def _tensors(seen: Observations, names: Sequence[str], side: str) -> dict[tuple[str, ...], Statistics]:
    """The observed tensors of a side, by the layers that have them."""
    statistics = seen.inputs if side == "input" else seen.outputs
    groups = {name: group for group in seen.shared for name in group} if side == "input" else {}
    found: dict[tuple[str, ...], Statistics] = {}
    for name in names:
        members = tuple(n for n in groups.get(name, (name,)) if n in names)
        found[members] = statistics[name]
    return found


def search_ranges(
    model: nn.Module,
    windows: Sequence[Tensor],
    seen: Observations,
    inputs: Mapping[str, float],
    outputs: Mapping[str, float],
    count: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Choice, ...]:
    """Choose the ranges of the loudest tensors by the model's loss.

    Args:
        model: the model that runs; its weights should be what will be stored, or close.
        windows: int64 `[length]` token ids each, read once for each range tried.
        seen: observations with histograms of all the sides below.
        inputs: the input scales of every quantized side, chosen otherwise; those of the loudest are not used.
        outputs: likewise for outputs.
        count: how many tensors of the decoder layers to search.
        progress: called with the ranges tried and the ranges in all.

    Returns:
        What was chosen, in the model's order.

    Raises:
        SequentialError: the model's layers cannot be run one at a time.
    """
    prefix, layers = decoder_layers(model)
    device = next(model.parameters()).device
    used = [window.to(device) for window in windows]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    ranked = [
        (loudness(statistics), side, names, statistics)
        for side, scales in (("input", inputs), ("output", outputs))
        for names, statistics in _tensors(seen, list(scales), side).items()
        if names[0].startswith(f"{prefix}.")
    ]
    loudest = sorted(ranked, key=lambda item: -item[0])[:count]
    loudest.sort(key=lambda item: (order[item[2][0]], item[1]))
    calls = layer_calls(model, layers, used[0])
    first = [first_hidden(model, layers[0], window) for window in used]
    divergence = Divergence(model, used)
    limits: dict[tuple[str, tuple[str, ...]], float] = {}
    losses: dict[tuple[str, tuple[str, ...]], dict[float, float]] = {}
    tried = 0
    with Simulation(model, inputs, outputs) as simulation, torch.no_grad():
        scales_of = {"input": simulation.inputs, "output": simulation.outputs}
        for _, side, names, _ in loudest:
            for name in names:
                del scales_of[side][name]
        for sweep in range(2):
            states, at = first, 0
            for _, side, names, statistics in loudest:
                key = side, names
                index = int(names[0].removeprefix(f"{prefix}.").split(".")[0])
                states, at = advance(list(layers)[at:index], calls[at:index], states), index
                found: dict[float, float] = {}
                with entered_at(layers, index, states):
                    for limit in candidates(statistics) if sweep == 0 else _around(limits[key], statistics):
                        scales_of[side].update(dict.fromkeys(names, limit / CODE_MAX))
                        found[limit] = divergence()
                        tried += 1
                        if progress is not None:
                            progress(tried, max(tried, len(loudest) * TRIED))
                losses[key] = found
                limits[key] = min(found, key=found.__getitem__)
                scales_of[side].update(dict.fromkeys(names, limits[key] / CODE_MAX))
    if progress is not None:
        progress(len(loudest) * TRIED, len(loudest) * TRIED)
    return tuple(Choice(names, side, limits[side, names], losses[side, names]) for _, side, names, _ in loudest)
