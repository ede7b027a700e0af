"""`verify`'s proof of the operations between the layers: right kernels pass, wrong ones are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import float_oracle as independent
from bytelane.kernels import cpu, float_ops
from bytelane.report import float_oracle
from bytelane.report.verify import verify_kernels
from bytelane.report.verify_float import DTYPES, OPERATIONS, verify_operation

FUNCTIONS = {
    "norm": "norm_rows",
    "rotary": "head_rows",
    "gate": "gate_rows",
    "dense": "dense",
    "attention": "attention",
    "store_codes": "store_codes",
}


@pytest.mark.parametrize("isa", cpu.compiled_isas())
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_right_or_says_why_it_did_not_run(op: str, isa: str) -> None:
    check = verify_operation(op, isa, seed=3)
    assert (check.differing, check.first) == (0, None)
    if isa in cpu.supported_isas():
        assert check.problems >= 6
        assert check.values > 5000
    else:
        assert check.skipped == f"this processor has no {isa}"


@pytest.mark.parametrize("op", OPERATIONS)
def test_one_wrong_bit_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = FUNCTIONS[op]
    right: Callable[..., Any] = getattr(float_ops, name)

    def off(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        changed = arguments[2] if found is None else found  # codes are written in place
        width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[changed.element_size()]
        changed.view(width)[(-1,) * changed.dim()] ^= 1
        return found

    monkeypatch.setattr(f"bytelane.kernels.float_ops.{name}", off)
    check = verify_operation(op, cpu.supported_isas()[0])
    assert check.differing == check.problems
    assert check.first is not None
    assert check.first.startswith("1 of ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_oracles_agree(dtype: str) -> None:
    """Written apart, from the kernels' formulas: `bytelane verify` relies on one, the test suite on the other."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return independent.round_to(rng.normal(size=shape).astype(np.float32), dtype)

    def same(a: np.ndarray, b: np.ndarray) -> None:
        assert np.array_equal(a.view(np.int32), b.view(np.int32))

    x, w = values(5, 100), values(100)
    same(float_oracle.norm(x, w, 1e-6, weight_in_t=True, dtype=dtype), independent.norm(x, w, 1e-6, True, dtype))
    same(float_oracle.rotate(x, w, w[::-1], dtype), independent.rotary(x, w, w[::-1], dtype))
    for name in ("silu", "gelu_pytorch_tanh"):
        same(float_oracle.gate(x * 30, x, name, dtype), independent.gate(x * 30, x, name, dtype))
    weight = values(7, 100)
    same(float_oracle.dense(x, weight, None, dtype), independent.dense(x, weight, None, dtype))
    q, k, v, seen = values(20), values(9, 20), values(9, 20), rng.random(9) < 0.6
    ours = float_oracle.attend(q, k[seen], v[seen], np.float32(0.3), np.float32(1), dtype)
    same(ours, independent.attend(q, k, v, 0.3, 1.0, seen, dtype))
    span = np.linspace(-90, 90, 10001, dtype=np.float32)
    same(float_oracle.exponential(span), independent.exponential(span))


def test_the_command_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytelane.report.verify.TABLE", ())
    steps: list[tuple[int, int]] = []
    found = verify_kernels(progress=lambda *step: steps.append(step))
    assert [(c.kernel, c.op) for c in found] == [
        (f"cpu.{isa}.between", op) for isa in cpu.compiled_isas() for op in OPERATIONS
    ]
    assert steps[-1] == (len(found), len(found))
