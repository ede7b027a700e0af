"""Perplexity against its definition in float64, and the paired comparison."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bytelane import evaluate
from bytelane.evaluate import compare_perplexity, compare_results, perplexity


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def used() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 50, (n,)) for n in (17, 5, 2)]


def test_perplexity_is_its_definition(model, used) -> None:
    steps: list[tuple[int, int]] = []
    result = perplexity(model, used, lambda *step: steps.append(step))
    losses = []
    for window in used:
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        losses.append([-torch.log_softmax(logits[t], -1)[window[t + 1]].item() for t in range(len(window) - 1)])
    expected = sum(map(sum, losses)) / (16 + 4 + 1)
    # The model's logits are float32; their log-softmax over 50 classes errs by some epsilons of the largest logit.
    tolerance = 64 * torch.finfo(torch.float32).eps * 16
    assert result.nll == pytest.approx(expected, abs=tolerance)
    assert result.perplexity == math.exp(result.nll)
    assert result.tokens == 21
    assert result.window_nll == pytest.approx([statistics.mean(w) for w in losses], abs=tolerance)
    assert result.tokens_per_second == result.tokens / result.seconds
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_chunks_do_not_change_the_loss(model, used, monkeypatch) -> None:
    whole = perplexity(model, used)
    monkeypatch.setattr(evaluate, "_LOGITS_BYTES", 4 * 50 * 3)  # three positions at a time
    assert perplexity(model, used).window_nll == whole.window_nll


def test_a_uniform_model_scores_its_vocabulary(used) -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50)
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.train()
    assert perplexity(model, used).perplexity == pytest.approx(50, rel=1e-6)
    assert model.training


def test_the_comparison_is_paired(model, used) -> None:
    steps: list[int] = []
    same = compare_perplexity(model, model, used, lambda done, total: steps.append(done))
    assert same.nll_increase == 0
    assert same.standard_error == 0
    assert steps == [1, 2, 3, 4, 5, 6]
    other = perplexity(model, [w.flip(0) for w in used])
    compared = compare_results(same.reference, other)
    gaps = [b - a for a, b in zip(same.reference.window_nll, other.window_nll, strict=True)]
    assert compared.nll_increase == pytest.approx(statistics.mean(gaps))
    assert compared.standard_error == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    with pytest.raises(ValueError, match="same windows"):
        compare_results(same.reference, perplexity(model, used[:2]))


@pytest.mark.parametrize("bad", [[], [torch.tensor([1])], [torch.zeros(2, 2, dtype=torch.int64)]])
def test_windows_that_predict_nothing_are_refused(model, bad) -> None:
    with pytest.raises(ValueError, match="at least 2 token ids"):
        perplexity(model, bad)
