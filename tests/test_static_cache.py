"""The static int8 cache holds the codes of the growing one, and generates the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import bytelane
from bytelane.cache import cache_keyword, kv_scales, make_cache
from bytelane.static_cache import Int8StaticCache, Int8StaticLayer, Int8StaticSlidingWindowLayer, make_static_cache

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"


@pytest.fixture(scope="module")
def model() -> Any:
    return bytelane.load_model(GEMMA, dtype=torch.float32)


def test_it_holds_the_codes_of_the_growing_cache(model: Any) -> None:
    ids = torch.randint(3, 120, (1, 9), generator=torch.Generator().manual_seed(0))
    growing, static = make_cache(model), make_static_cache(model, 16)
    assert isinstance(static, Int8StaticCache)
    with torch.inference_mode():
        for cache in (growing, static):
            model(ids, **{cache_keyword(model): cache})
    int8 = [i for i in kv_scales(model) if i < len(static.layers)]
    assert int8
    for index in int8:
        layer = static.layers[index]
        assert isinstance(layer, Int8StaticLayer | Int8StaticSlidingWindowLayer)
        assert layer.keys.dtype == torch.int8
        held = growing.layers[index]
        assert torch.equal(layer.keys[:, :, :9], held.keys[:, :, -9:])
        assert torch.equal(layer.values[:, :, :9], held.values[:, :, -9:])


def test_it_generates_the_tokens_of_the_growing_cache(model: Any) -> None:
    ids = torch.randint(3, 120, (1, 7), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 20}
    with torch.inference_mode():
        expected = model.generate(ids, **options)
        static = model.generate(ids, **{cache_keyword(model): make_static_cache(model, 27)}, **options)
    assert torch.equal(static, expected)


def test_a_model_with_a_float_cache_gets_a_float_one() -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.float32, kv_cache="float")
    assert type(make_static_cache(model, 8)) is StaticCache
