"""Tracing: equal runs show nothing, different arithmetic shows where, and integer layers never start a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from bytelane import errors
from bytelane.scheme import LinearScheme, WeightScheme
from bytelane.trace import Way, compare, run, trace

GEMMA = str(Path(__file__).parent / "data" / "gemma4-tiny-mobile")
IDS = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("a/b", Way("a/b")),
        ("a@b/c", Way("a@b/c")),
        ("a@emulated", Way("a", "emulated")),
        ("a@integer,chunk=16,batch=3,threads=1", Way("a", "integer", 1, 3, 16)),
    ],
)
def test_ways_are_parsed(text: str, way: Way) -> None:
    assert Way.parse(text) == way


@pytest.mark.parametrize("text", ["a@float", "a@integer,speed=3", "a@integer,batch=0"])
def test_unknown_ways_are_refused(text: str) -> None:
    with pytest.raises(errors.ConfigError):
        Way.parse(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulation_equals_transformers_and_differs_from_the_integers(dtype: torch.dtype) -> None:
    same = trace(Way(GEMMA, "emulated"), Way(GEMMA, "transformers"), IDS, dtype=dtype)
    assert same.first is None
    assert same.argmax_agreement == 1
    other = trace(Way(GEMMA), Way(GEMMA, "emulated"), IDS, dtype=torch.bfloat16)
    assert other.first is not None
    name, side = other.first
    assert (name, side) == ("model.layers.0.self_attn.q_proj", "output")
    assert {layer.name for layer in other.layers} >= {"lm_head", "model.layers.5.mlp.down_proj"}


@pytest.mark.parametrize("options", ["threads=1", "batch=3", "chunk=7", "chunk=1", "batch=2,chunk=5,threads=1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_runs_are_the_same_bits(options: str, dtype: torch.dtype) -> None:
    """Batches, threads and chunks change nothing: not a layer, and not what lies between."""
    found = trace(Way(GEMMA), Way.parse(f"{GEMMA}@integer,{options}"), IDS, dtype=dtype)
    assert found.first in (None, ("lm_head", "output"))
    # in float32 a head without an input scale is torch's matmul, the one operation whose sums depend on its rows
    assert found.first is None or dtype is torch.float32
    assert found.argmax_agreement == 1


@pytest.mark.parametrize("options", ["threads=1", "batch=3", "chunk=7"])
def test_torchs_float_operations_never_make_a_layer_start_a_difference(options: str) -> None:
    ways = Way(GEMMA), Way.parse(f"{GEMMA}@integer,{options}")
    found = compare(*(run(way, IDS, dtype=torch.bfloat16, native=False) for way in ways))
    for layer in found.layers:
        if layer.name in ("lm_head", "model.per_layer_model_projection"):
            continue  # no input scale: a float matmul
        equal_rows = layer.input.first_position
        assert layer.output.differing == 0 or equal_rows is not None
        if layer.output.first_position is not None and equal_rows is not None:
            assert layer.output.first_position >= equal_rows


def test_two_checkpoints_of_other_shapes_are_refused(tmp_path: Path) -> None:
    for name, inner in (("a", 96), ("b", 128)):
        config = tiny.config("llama", intermediate_size=inner)
        tiny.write_random(tmp_path / name, config, {"model.layers.0.mlp.up_proj": LinearScheme(WeightScheme(4))})
    with pytest.raises(errors.ConfigError, match="differ in shape"):
        trace(Way(str(tmp_path / "a")), Way(str(tmp_path / "b")), IDS[:5] % 100)
