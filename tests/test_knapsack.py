"""Choosing under a budget is exact: against every choice there is, and at the size of a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bytelane.quantize import knapsack
from bytelane.quantize.knapsack import BudgetError, solve


def every_choice(options: list[list[tuple[float, float]]], budget: float) -> float | None:
    totals = [np.sum(choice, axis=0) for choice in itertools.product(*options)]
    return min((float(v) for c, v in totals if c <= budget), default=None)


def model_like(layers: int, seed: int) -> list[list[tuple[float, float]]]:
    """Bytes and losses as layers have them: sizes that repeat, losses that fall by about four a bit, with noise."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        weights = int(rng.choice([331776, 110592, 884736]))
        base = float(np.exp(rng.normal(-3, 1.5)))
        found.append(
            [(weights * b / 8, base * 4.0 ** (2 - b) * float(np.exp(rng.normal(0, 0.2)))) for b in (2, 3, 4, 5, 6, 8)]
        )
    return found


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_better_than_what_is_chosen(seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = seed % 2 == 0
    options = [
        [(float(rng.integers(1, 12)), float(rng.integers(0, 9)) if whole else float(rng.random())) for _ in range(n)]
        for n in rng.integers(1, 5, size=6)
    ]
    low, high = (sum(f(c for c, _ in o) for o in options) for f in (min, max))
    for budget in np.linspace(low, high, 9):
        found = solve(options, float(budget))
        assert found.exact
        assert found.cost <= budget + 1e-9
        costs, values = zip(*(o[i] for o, i in zip(options, found.chosen, strict=True)), strict=True)
        assert (sum(costs), sum(values)) == pytest.approx((found.cost, found.value))
        assert found.value == pytest.approx(every_choice(options, float(budget)), abs=1e-9)
    with pytest.raises(BudgetError, match="more than the budget"):
        solve(options, low - 1)


def test_a_models_size_is_solved_exactly() -> None:
    options = model_like(120, 0)
    budget = sum(o[2][0] for o in options)  # four bits everywhere
    found = solve(options, budget)
    assert found.exact
    assert found.cost <= budget
    assert found.value < 0.5 * sum(o[2][1] for o in options)


def test_what_is_not_proven_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = model_like(60, 1)
    budget = sum(o[2][0] for o in options) + 1
    best = solve(options, budget)
    monkeypatch.setattr(knapsack, "MAX_STATES", 1)
    found = solve(options, budget)
    assert found.cost <= budget
    assert found.bound <= best.value <= found.value
    assert not found.exact
    assert found.value - found.bound < 0.01 * found.value
