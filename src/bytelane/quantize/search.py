"""Ranges by task loss, for the few tensors whose loudest value says nothing about the rest.

A first token's massive activations are hundreds of times what other tokens have, and the model needs them: clipped to a
percentile, attention loses its sink; covered, all other tokens lose their steps. No statistic of the tensor alone finds
the range between, so it is tried out. The sides are ordered by `amax / percentile(99)`, the loudest are set free (a
float side), and in the model's order each is given the one of `CANDIDATES` ranges, spread evenly in the logarithm from
that percentile to amax, under which the simulated model's loss is least, with the sides before it as chosen. (In
windows of 512 tokens the first tokens are 0.2 % of all values: the percentile must leave out more than that.)
The layers before the one in question are not run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bytelane.quantize.layerwise import advance, decoder_layers, entered_at, first_hidden, layer_calls
from bytelane.quantize.observe import CODE_MAX, Observations, Statistics
from bytelane.quantize.simulate import Simulation

CANDIDATES = 6
QUIET = 99.0
"""Percentile that stands for the ordinary values of a tensor, and the narrowest range tried."""


@dataclass(frozen=True)
class Choice:
    """One side's range, chosen by loss.

    Attributes:
        names: the layers: one, or all that read the tensor.
        side: `"input"` or `"output"`.
        limit: the end of the range.
        losses: the loss in nats a token under each range tried, by its end.
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
    """The ends of the ranges to try, ascending."""
    top = statistics.amax()
    bottom = max(statistics.percentile(QUIET), top / 1e4)
    return [bottom * (top / bottom) ** (i / (CANDIDATES - 1)) for i in range(CANDIDATES)]


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
    chosen: list[Choice] = []
    calls = layer_calls(model, layers, used[0])
    states = [first_hidden(model, layers[0], window) for window in used]
    at = 0
    with Simulation(model, inputs, outputs) as simulation:
        scales_of = {"input": simulation.inputs, "output": simulation.outputs}
        for _, side, names, _ in loudest:
            for name in names:
                del scales_of[side][name]
        for _, side, names, statistics in loudest:
            index = int(names[0].removeprefix(f"{prefix}.").split(".")[0])
            states, at = advance(list(layers)[at:index], calls[at:index], states), index
            losses: dict[float, float] = {}
            with entered_at(layers, index, states):
                for limit in candidates(statistics):
                    scales_of[side].update(dict.fromkeys(names, limit / CODE_MAX))
                    losses[limit] = simulation.loss(used)
                    if progress is not None:
                        progress(len(chosen) * CANDIDATES + len(losses), len(loudest) * CANDIDATES)
            best = min(losses, key=losses.__getitem__)
            scales_of[side].update(dict.fromkeys(names, best / CODE_MAX))
            chosen.append(Choice(names, side, best, losses))
    return tuple(chosen)
