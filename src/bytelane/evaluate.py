"""Perplexity of a causal language model over windows of token ids.

Every window is read on its own: position t predicts token t + 1, the first token is only read. With N predicted tokens
over all windows, and log-probabilities in float32 summed in float64,

    nll = -1/N sum log p(token)          perplexity = exp(nll)

Two models are compared on the same windows. The difference of their mean losses is a paired one, so its standard error
comes from the differences window by window and is far smaller than either model's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LOGITS_BYTES = 64 * 1024**2
"""float32 logits held beside the model's own at a time."""


@dataclass(frozen=True)
class PerplexityResult:
    """What a model scores on some windows.

    Attributes:
        perplexity: `exp(nll)`.
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: predicted tokens.
        seconds: wall time.
        tokens_per_second: predicted tokens over wall time.
        window_nll: the mean of each window, in nats.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float
    tokens_per_second: float
    window_nll: tuple[float, ...]


@dataclass(frozen=True)
class PerplexityComparison:
    """Two models on the same windows.

    Attributes:
        reference: the float model's result.
        quantized: the quantized model's result.
        nll_increase: mean over windows of the loss's increase, in nats a token.
        standard_error: of `nll_increase`; NaN for a single window.
    """

    reference: PerplexityResult
    quantized: PerplexityResult
    nll_increase: float
    standard_error: float


def positions_at_once(vocabulary: int) -> int:
    """Positions whose float32 logits are held at a time beside the model's own."""
    return max(1, _LOGITS_BYTES // (4 * vocabulary))


def _loss(logits: Tensor, labels: Tensor) -> float:
    """Summed negative log-likelihood: logits `[n, vocabulary]`, labels int64 `[n]`; chunked over positions."""
    step = positions_at_once(logits.shape[-1])
    total = 0.0
    for start in range(0, labels.shape[0], step):
        part = logits[start : start + step].to(torch.float32)
        losses = nn.functional.cross_entropy(part, labels[start : start + step].to(part.device), reduction="none")
        total += float(losses.to(torch.float64).sum())
    return total


@torch.no_grad()
def perplexity(
    model: Any, windows: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> PerplexityResult:
    """Score a model.

    Args:
        model: any transformers causal language model, float or quantized; its training mode is restored afterwards.
        windows: int64 `[length]` token ids each, at least 2: see `bytelane.quantize.windows`.
        progress: called with the windows done and the windows in all.

    Raises:
        ValueError: no window, or one too short to predict anything.
    """
    if not windows or any(w.dim() != 1 or w.numel() < 2 for w in windows):
        raise ValueError("perplexity needs at least one window, and windows of at least 2 token ids, each of shape [n]")
    device = next(model.parameters()).device
    training = model.training
    started = time.perf_counter()
    sums: list[float] = []
    model.eval()
    try:
        for done, window in enumerate(windows, start=1):
            logits = model(input_ids=window[None].to(device), use_cache=False).logits[0, :-1]
            sums.append(_loss(logits, window[1:]))
            if progress is not None:
                progress(done, len(windows))
    finally:
        model.train(training)
    return result_of(sums, [window.numel() - 1 for window in windows], time.perf_counter() - started)


def result_of(sums: Sequence[float], counts: Sequence[int], seconds: float) -> PerplexityResult:
    """The result of windows whose summed losses (nats) and numbers of predicted tokens are known.

    Args:
        sums: of each window.
        counts: of each window, at least 1.
        seconds: wall time of all of them.
    """
    tokens = sum(counts)
    nll = math.fsum(sums) / tokens
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < math.log(torch.finfo(torch.float64).max) else math.inf,
        nll=nll,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        window_nll=tuple(s / n for s, n in zip(sums, counts, strict=True)),
    )


def compare_perplexity(
    reference: Any,
    quantized: Any,
    windows: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityComparison:
    """Score a float model and its quantized form on the same windows.

    Args:
        reference: the float model.
        quantized: the quantized model.
        windows: see `perplexity`.
        progress: called with the windows done and the windows in all, of both models together.
    """
    total = 2 * len(windows)

    def later(done: int, _: int) -> None:
        if progress is not None:
            progress(len(windows) + done, total)

    first = perplexity(reference, windows, None if progress is None else lambda done, _: progress(done, total))
    second = perplexity(quantized, windows, later)
    return compare_results(first, second)


def compare_results(reference: PerplexityResult, quantized: PerplexityResult) -> PerplexityComparison:
    """The paired comparison of two results on the same windows.

    Raises:
        ValueError: the results are not of the same windows.
    """
    count = len(reference.window_nll)
    if (count, reference.tokens) != (len(quantized.window_nll), quantized.tokens):
        raise ValueError("the two results must come from the same windows")
    gaps = [q - r for r, q in zip(reference.window_nll, quantized.window_nll, strict=True)]
    mean = math.fsum(gaps) / count
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (count - 1) if count > 1 else math.nan
    return PerplexityComparison(reference, quantized, mean, math.sqrt(variance / count))
