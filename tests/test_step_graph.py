"""The captured decoding step gives the logits of the growing cache; without a GPU the same step is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bytelane
import tiny
from bytelane.cache import cache_keyword, make_cache
from bytelane.checkpoint import KVScales
from bytelane.errors import ModelConfigError
from bytelane.step_graph import StepGraph

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# on the CPU every operation in bfloat16 is bytelane's; on a GPU float32 leaves torch's orders of summing least to say
DTYPE = torch.bfloat16 if DEVICE == "cpu" else torch.float32


def load(architecture: str, folder: Path, kv_cache: Any = "auto") -> Any:
    config = tiny.config(architecture)
    scales = {f"model.layers.{i}.self_attn": KVScales(0.02, 0.03) for i in range(2)}
    tiny.write_random(folder / "model", config, tiny.default_schemes(config), kv_scales=scales)
    return bytelane.load_model(folder / "model", dtype=DTYPE, device=DEVICE, kv_cache=kv_cache)


def growing(model: Any, prompt: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
    """Logits after the prompt and after each token, with the growing cache."""
    cache, found = make_cache(model), []
    with torch.inference_mode():
        for piece in [prompt, *(torch.tensor([token]) for token in tokens)]:
            logits = model(piece[None].to(model.device), **{cache_keyword(model): cache}, use_cache=True).logits
            found.append(logits[0, -1])
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gemma4"])
def test_it_gives_the_logits_of_the_growing_cache(architecture: str, tmp_path: Path) -> None:
    """Past the sliding window of 16, too; with a float cache, which both read alike."""
    model = load(architecture, tmp_path, "float")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 120, (11,), generator=generator)
    tokens = torch.randint(3, 120, (14,), generator=generator).tolist()
    expected = growing(model, prompt, tokens)
    graph = StepGraph(model, 32)
    found = [graph.read(prompt[:4]), graph.read(prompt[4:])][1:] + [graph.step(token).clone() for token in tokens]
    assert graph.used == 25
    for one, other in zip(found, expected, strict=True):
        if DEVICE == "cpu":
            assert torch.equal(one, other)
        else:
            # the order of torch's sums follows the cache's length, and a last bit can turn a code into its neighbour
            assert torch.nn.functional.cosine_similarity(one, other, 0) > 0.99


@pytest.mark.parametrize("architecture", ["llama", "gemma4"])
def test_its_cache_holds_the_codes_of_the_growing_one(architecture: str, tmp_path: Path) -> None:
    """Of the first layer, whose keys no attention has gone into; the second's follow what attention sums."""
    model = load(architecture, tmp_path)
    tokens = list(range(3, 16))
    graph, cache = StepGraph(model, 16), make_cache(model)
    graph.read(torch.tensor(tokens[:4]))
    for token in tokens[4:]:
        graph.step(token)
    with torch.inference_mode():
        model(torch.tensor([tokens], device=DEVICE), **{cache_keyword(model): cache}, use_cache=True)
    held: Any = graph.cache.layers[0]
    assert held.keys.dtype is torch.int8
    assert torch.equal(held.keys[:, :, :13], cache.layers[0].keys)
    assert torch.equal(held.values[:, :, :13], cache.layers[0].values)
    assert not held.keys[:, :, 13:].any()


def test_it_reads_on_after_steps(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    whole, parts = StepGraph(model, 16), StepGraph(model, 16)
    expected = whole.read(torch.tensor([5, 6, 7, 8, 9]))
    parts.read(torch.tensor([5, 6]))
    parts.step(7)
    found = parts.read(torch.tensor([8, 9]))
    assert torch.equal(found.argmax(), expected.argmax())


def test_a_full_cache_is_refused(tmp_path: Path) -> None:
    graph = StepGraph(load("llama", tmp_path), 4)
    graph.read(torch.tensor([5, 6, 7]))
    graph.step(8)
    with pytest.raises(ValueError, match="4 of 4 positions"):
        graph.step(9)


def test_other_models_are_refused() -> None:
    class Model:
        def get_decoder(self) -> Any:
            return torch.nn.Linear(1, 1)

    with pytest.raises(ModelConfigError, match="Linear is not an architecture"):
        StepGraph(Model(), 4)  # type: ignore[arg-type]
