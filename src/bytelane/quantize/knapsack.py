r"""One option for each item, least value under a budget: the multiple-choice knapsack, solved exactly.

    choose j_i for every item i:     minimize sum v[i][j_i]    with    sum c[i][j_i] <= budget

Two relaxations make it quick. An option that costs more and is worth no more than another of its item is dropped. Of
what is left, the lower convex hull of each item's (cost, value) points gives the linear relaxation: its segments are
taken in the order of their slopes until the budget is used up, which is also the best that Lagrange multipliers can
prove. Taking whole segments only is a solution (the incumbent).

Then states (cost so far, value so far) are built item by item, each joined with every option, and dropped if

- another state costs no more and is worth no more (dominance), or
- its value and the linear relaxation of the items to come, at the budget left, reach the incumbent's value (bound).

Neither drops the optimum, so what is left at the end is the optimum, or nothing and the incumbent is. Only if more
than `MAX_STATES` remain are those with the worst bounds dropped; the solution then says that it is not proven, and its
`bound` how far from the optimum it can be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelane.errors import QuantizeError

MAX_STATES = 100_000
_SLACK = 1e-12
"""Relative: sums of the same floats in another order are equal."""

Floats = NDArray[np.float64]


class BudgetError(QuantizeError):
    """No choice fits the budget, or the budget says nothing."""


@dataclass(frozen=True)
class Solution:
    """A choice for every item.

    Attributes:
        chosen: the index of each item's option.
        cost: of all, at most the budget.
        value: of all.
        bound: no choice within the budget has less value than this.
        exact: whether none has less value than `value`.
    """

    chosen: tuple[int, ...]
    cost: float
    value: float
    bound: float
    exact: bool


@dataclass(frozen=True)
class _Item:
    """An item's undominated options in the order of rising cost, and those of them on the hull."""

    costs: Floats
    values: Floats
    indices: tuple[int, ...]
    hull: tuple[int, ...]


def _item(options: Sequence[tuple[float, float]]) -> _Item:
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: options[i]):
        if not kept or options[index][1] < options[kept[-1]][1]:
            kept.append(index)
    points = [options[i] for i in kept]
    hull: list[int] = []
    for at, (cost, value) in enumerate(points):
        while len(hull) > 1:
            (c0, v0), (c1, v1) = points[hull[-2]], points[hull[-1]]
            if (v1 - v0) * (cost - c0) < (value - v0) * (c1 - c0):
                break
            hull.pop()  # on or above the line from its neighbour to the new point
        hull.append(at)
    costs, values = (np.array([float(p[k]) for p in points]) for k in (0, 1))
    return _Item(costs, values, tuple(kept), tuple(hull))


@dataclass(frozen=True)
class _Segment:
    slope: float
    item: int
    step: int
    cost: float
    value: float


def _segments(item: _Item, number: int) -> list[_Segment]:
    found = []
    for step, (a, b) in enumerate(itertools.pairwise(item.hull)):
        cost, value = float(item.costs[b] - item.costs[a]), float(item.values[b] - item.values[a])
        found.append(_Segment(value / cost, number, step, cost, value))
    return found


def _relaxed(items: Sequence[_Item], segments: Sequence[_Segment]) -> tuple[Floats, Floats]:
    """The linear relaxation of some items: budgets, rising, and the least value at each; linear between."""
    start = (sum(float(i.costs[0]) for i in items), sum(float(i.values[0]) for i in items))
    costs = np.cumsum([start[0], *(s.cost for s in segments)])
    return costs, np.cumsum([start[1], *(s.value for s in segments)])


def _greedy(items: Sequence[_Item], segments: Sequence[_Segment], budget: float) -> tuple[list[int], float, float]:
    """Whole segments in the order of their slopes, those that do not fit left out: options, cost and value."""
    steps = [0] * len(items)
    cost = sum(float(i.costs[0]) for i in items)
    for s in segments:
        if steps[s.item] == s.step and cost + s.cost <= budget:
            steps[s.item], cost = s.step + 1, cost + s.cost
    chosen = [item.hull[step] for item, step in zip(items, steps, strict=True)]
    value = sum(float(item.values[at]) for item, at in zip(items, chosen, strict=True))
    return chosen, cost, value


def solve(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> Solution:
    """Choose one option for each item.

    Args:
        options: for each item its options, at least one, each a finite (cost, value).
        budget: of all costs together.

    Raises:
        BudgetError: the cheapest options together cost more than the budget.
    """
    order = sorted(range(len(options)), key=lambda i: -max(v for _, v in options[i]))
    items = [_item(options[i]) for i in order]
    slack = abs(budget) * _SLACK
    least = sum(float(item.costs[0]) for item in items)
    if least > budget + slack:
        raise BudgetError(f"the cheapest choice costs {least:g}, more than the budget of {budget:g}")
    segments = sorted((s for n, item in enumerate(items) for s in _segments(item, n)), key=lambda s: s.slope)
    suffixes = [_relaxed(items[n:], [s for s in segments if s.item >= n]) for n in range(len(items) + 1)]
    bound = float(np.interp(budget, *suffixes[0]))
    chosen, cost, value = _greedy(items, segments, budget + slack)
    exact = True
    costs, values = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for n, item in enumerate(items):
        came = np.repeat(np.arange(len(costs)), len(item.costs))
        took = np.tile(np.arange(len(item.costs)), len(costs))
        costs, values = costs[came] + item.costs[took], values[came] + item.values[took]
        left, worth = suffixes[n + 1]
        bounds = values + np.interp(budget - costs, left, worth)
        keep = np.flatnonzero((costs + left[0] <= budget + slack) & (bounds < value * (1 - _SLACK)))
        keep = keep[np.lexsort((values[keep], costs[keep]))]
        before = np.concatenate(([np.inf], np.minimum.accumulate(values[keep])[:-1])) if len(keep) else values[keep]
        keep = keep[values[keep] < before]
        if len(keep) > MAX_STATES:
            exact = False
            keep = np.sort(keep[np.argpartition(bounds[keep], MAX_STATES)[:MAX_STATES]])
        costs, values = costs[keep], values[keep]
        trail.append((came[keep], took[keep]))
    if len(costs):
        at = int(np.argmin(values))
        cost, value = float(costs[at]), float(values[at])
        for n in reversed(range(len(items))):
            came, took = trail[n]
            chosen[n], at = int(took[at]), int(came[at])
    answer = [0] * len(items)
    for n, item in enumerate(items):
        answer[order[n]] = item.indices[chosen[n]]
    return Solution(tuple(answer), cost, value, value if exact else bound, exact)
