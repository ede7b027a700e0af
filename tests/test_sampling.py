"""The sampler's distribution is transformers' own, and so are the answers it leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import bytelane
from bytelane import generation
from bytelane.sampling import Chooser, Sampling, end_tokens, unhandled

GEMMA = Path(__file__).parent / "data" / "gemma4-tiny-mobile"
USED = [3, 3, 17, 900]


def theirs(logits: torch.Tensor, chooser: Chooser) -> torch.Tensor:
    """Probabilities of the whole vocabulary, by transformers' processors."""
    steps = LogitsProcessorList()
    if chooser.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(chooser.repetition_penalty))
    steps.append(TemperatureLogitsWarper(float(chooser.temperature)))
    if chooser.top_k:
        steps.append(TopKLogitsWarper(chooser.top_k))
    if chooser.top_p < 1:
        steps.append(TopPLogitsWarper(chooser.top_p))
    if chooser.min_p:
        steps.append(MinPLogitsWarper(chooser.min_p))
    return steps(torch.tensor([USED]), logits[None].float()).double().softmax(-1)[0]


def ours(logits: torch.Tensor, chooser: Chooser) -> torch.Tensor:
    tokens, weights = chooser.distribution(logits, USED)
    whole = torch.zeros(len(logits), dtype=torch.float64)
    whole[torch.arange(len(logits)) if tokens is None else tokens] = weights
    return whole / whole.sum()


@pytest.mark.parametrize("top_k", [0, 1, 40, 20000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-9])
@pytest.mark.parametrize("min_p", [0.0, 0.02])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_distribution_is_transformers_own(top_k: int, top_p: float, min_p: float, spread: float) -> None:
    """float32 logits without ties; both sides sum probabilities in their own order, which 1e-6 allows for."""
    logits = torch.randn(10000, generator=torch.Generator().manual_seed(1)) * spread
    for temperature, penalty in ((1.0, 1.0), (0.6, 1.3)):
        chooser = Chooser(True, temperature, top_k, top_p, min_p, penalty)
        found, expected = ours(logits, chooser), theirs(logits, chooser)
        # a token whose probability decides the border of top_p within rounding may be on either side
        assert ((found > 0) != (expected > 0)).sum() <= (1 if top_p < 1 else 0)
        assert (found - expected).abs().max() < 1e-6 + 2 * float(expected[expected > 0].min() < 1e-4) * 1e-4


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    chooser = Chooser(True, top_k=3, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([chooser.choose(logits, []) for _ in range(9000)]), minlength=4)
    assert counts[0] == 0
    expected = torch.tensor([0.2, 0.3, 0.4]) / 0.9
    # five standard deviations of a share of 9000 draws
    assert ((counts[1:] / 9000 - expected).abs() < 5 * (expected * (1 - expected) / 9000).sqrt()).all()
    whole = Chooser(True, top_k=0, generator=torch.Generator().manual_seed(0))
    assert {whole.choose(logits, []) for _ in range(200)} == {0, 1, 2, 3}


def test_greedy_takes_the_likeliest_and_penalizes() -> None:
    logits = torch.tensor([1.0, 2.0, 1.9])
    assert Chooser().choose(logits, [1]) == 1
    assert Chooser(repetition_penalty=1.2).choose(logits, [1]) == 2
    assert Chooser(repetition_penalty=1.2).choose(-logits, [0]) == 0


def test_requests_go_before_the_configuration() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=64, top_p=0.95, eos_token_id=[1, 106])
    assert Chooser.of(Sampling(), config) == Chooser(True, 0.7, 64, 0.95)
    assert not Chooser.of(Sampling(greedy=True), config).sample
    assert Chooser.of(Sampling(top_k=5), config) == Chooser(True, 0.7, 5, 0.95)
    assert not Chooser.of(Sampling(), GenerationConfig()).sample
    assert Chooser.of(Sampling(temperature=0.5), GenerationConfig()) == Chooser(True, 0.5, 50, 1.0)
    assert end_tokens(config) == {1, 106}
    assert end_tokens(GenerationConfig(eos_token_id=7)) == {7}
    assert end_tokens(GenerationConfig()) == frozenset()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, []),
        ({"temperature": 0.5, "top_k": 3, "do_sample": True, "cache_implementation": "hybrid"}, []),
        ({"output_attentions": False, "output_hidden_states": False}, []),
        ({"output_hidden_states": True}, ["output_hidden_states"]),
        ({"num_beams": 4}, ["num_beams"]),
        ({"no_repeat_ngram_size": 2, "do_sample": True}, ["no_repeat_ngram_size"]),
        ({"suppress_tokens": [5]}, ["suppress_tokens"]),
    ],
)
def test_settings_it_does_not_know_are_named(given: dict[str, Any], left: list[str]) -> None:
    assert unhandled(GenerationConfig(**given)) == left


class Words:
    """A tokenizer as far as generation needs one."""

    pad_token_id = 0
    eos_token_id = 1

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


def answer(model: Any, ids: torch.Tensor, **given: Any) -> tuple[str, Any]:
    given = {"max_new_tokens": 12, "sampling": Sampling(greedy=True), "on_text": lambda _: None, **given}
    return generation.generate(model, Words(), ids, **given)


def test_greedy_answers_are_generates_own() -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.bfloat16)
    ids = torch.randint(3, 500, (1, 21), generator=torch.Generator().manual_seed(4))
    text, stats = answer(model, ids)
    output = model.generate(
        ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    assert text == Words().decode(output[0, 21:])
    assert (stats.prompt_tokens, stats.new_tokens) == (21, output.shape[1] - 21)


def test_long_prompts_go_in_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.bfloat16)
    ids = torch.randint(3, 500, (1, 50), generator=torch.Generator().manual_seed(5))
    whole, _ = answer(model, ids)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 16)
    assert answer(model, ids)[0] == whole


def test_every_end_token_ends_and_a_flag_stops() -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.bfloat16)
    ids = torch.randint(3, 500, (1, 9), generator=torch.Generator().manual_seed(6))
    model.generation_config.eos_token_id = None
    words = answer(model, ids)[0].split()
    model.generation_config.eos_token_id = [511, int(words[3])]
    ended, stats = answer(model, ids)
    assert ended.split() == words[: words.index(words[3]) + 1]
    assert stats.new_tokens == words.index(words[3]) + 1
    model.generation_config.eos_token_id = None
    calls: list[int] = []

    def stopped() -> bool:
        calls.append(1)
        return len(calls) == 3

    assert answer(model, ids, stopped=stopped)[0].split() == words[:3]


def test_seeds_repeat_and_settings_unknown_to_it_go_to_generate() -> None:
    model = bytelane.load_model(GEMMA, dtype=torch.bfloat16)
    ids = torch.randint(3, 500, (1, 9), generator=torch.Generator().manual_seed(6))
    drawn = [answer(model, ids, sampling=Sampling(temperature=2.0, seed=s))[0] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    model.generation_config.suppress_tokens = list(range(3, 512, 2))
    model.generation_config.eos_token_id = None
    assert all(int(word) % 2 == 0 for word in answer(model, ids)[0].split())
