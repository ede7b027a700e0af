"""The recorded outputs of the vendor runtime (LiteRT 2.3.0 with XNNPACK): every one of them, bit for bit.

The recording needs nothing installed; `test_litert.py` is the live counterpart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import oracle
from bytelane import numerics

RECORDING = Path(__file__).parent / "data" / "litert_linear.safetensors"
CASES = 60


@pytest.fixture(scope="module")
def recording() -> dict[str, np.ndarray]:
    return load_file(RECORDING)


def bits_of(y: np.ndarray) -> np.ndarray:
    """float32 as its bit patterns, so that -0.0 differs from 0.0 and NaN equals itself."""
    assert y.dtype == np.float32
    return np.ascontiguousarray(y).view(np.int32)


def case_of(recording: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    prefix = f"case{index:03d}."
    return {name.removeprefix(prefix): t for name, t in recording.items() if name.startswith(prefix)}


def test_recording_is_complete(recording):
    assert {name.split(".")[0] for name in recording} == {f"case{i:03d}" for i in range(CASES)}
    widths = {int(recording[f"case{i:03d}.num_bits"][0]) for i in range(CASES)}
    assert widths == {2, 4, 8}


@pytest.mark.parametrize("index", range(CASES))
def test_oracle_equals_the_vendor(recording, index):
    case = case_of(recording, index)
    y = oracle.linear(case["x"], case["codes"], case["weight_scale"], case["input_scale"], case["output_scale"])
    np.testing.assert_array_equal(bits_of(y), bits_of(case["y"]))


@pytest.mark.parametrize("index", range(CASES))
def test_numerics_equals_the_vendor(recording, index):
    case = {name: torch.from_numpy(t) for name, t in case_of(recording, index).items()}
    y = numerics.linear_integer(
        case["x"], case["codes"], case["weight_scale"], case["input_scale"], case["output_scale"]
    )
    np.testing.assert_array_equal(bits_of(y.numpy()), bits_of(case["y"].numpy()))
