"""Models, tokenizers and texts that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import calibration
import tiny
from bytelane.checkpoint import KVScales
from bytelane.scheme import LinearScheme, WeightScheme
from rowwise import gemma, row_by_row


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention only, KV scales in the first layer only, the other storage."""
    folder = tmp_path_factory.mktemp("cache") / "llama"
    config = tiny.config("llama")
    plan = {n: LinearScheme(WeightScheme(8)) for n in tiny.linear_names(config) if n != "lm_head"}
    scales = {"model.layers.0.self_attn": KVScales(0.011, 0.007)}
    tiny.write_random(folder, config, plan, kv_scales=scales)
    return folder


@pytest.fixture(scope="module")
def rowwise() -> Any:
    return row_by_row(gemma())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each of the tiny model's ids."""
    return calibration.make_tokenizer()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return calibration.make_documents()
