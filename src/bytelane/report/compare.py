"""Two models on the same text: what each layer lost, what the model lost, and where it began.

A is the reference, B is judged. Each is a float model, a checkpoint in `integer` or `emulated` numerics, or one as
transformers computes it. Both read the same windows of token ids in lockstep (`bytelane.report.lockstep`), and every
figure is a sum over windows (`bytelane.report.measures`), so memory does not grow with the text.

Per layer and side: SQNR of B against A, the clipped share on each end, the observed range against the static one, code
histograms. `alone` is the SQNR of B's layer fed A's input: the noise that this layer makes by itself, without what it
inherits. Of the whole: perplexity with its paired standard error, and over all predicted tokens

    KL = mean of sum_v p_A(v) (ln p_A(v) - ln p_B(v))    nats        top-1 = share of equal likeliest tokens
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytelane.errors import ConfigError
from bytelane.evaluate import PerplexityComparison, PerplexityResult, compare_results, positions_at_once, result_of
from bytelane.layers import QuantLinear
from bytelane.report.lockstep import Lockstep, Visit, linear_layers
from bytelane.report.measures import RatioSums, SideComparison, SideSums, side_scale, unclamped

DIVERGED = 20.0
"""dB: the first output below this is called the place where two models part."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True)
class LayerComparison:
    """One linear layer in both models, in the order of execution.

    Attributes:
        name: the layer's name.
        shape: `(out_features, in_features)`.
        scheme_a: `w4a8o8` and the like, or `float`.
        scheme_b: likewise.
        input: the side where it reads.
        output: the side where it writes.
        alone: SQNR of B's layer fed A's input, against A's output, in dB; None where they are equal.
        sensitivity: KL in nats a token when B's layer alone replaces A's; None where it was not measured.
    """

    name: str
    shape: tuple[int, int]
    scheme_a: str
    scheme_b: str
    input: SideComparison
    output: SideComparison
    alone: float | None
    sensitivity: float | None = None


@dataclass(frozen=True)
class CompareResult:
    """Two models compared.

    Attributes:
        layers: in the order of execution.
        perplexity: of both, paired by windows.
        kl: mean KL divergence of B from A, in nats a token.
        kl_standard_error: of `kl`, from the windows' means; NaN for a single window.
        kl_largest: of any token.
        top1_agreement: the share of positions whose likeliest token is the same.
        first_difference: the first layer with a difference and its side; None when all is equal.
        first_below: the first layer whose output SQNR is under `DIVERGED` dB, or None.
        only_a: linear layers that B lacks.
        only_b: likewise.
        tokens: predicted tokens.
        window: tokens in a window, the longest where they differ.
        seconds: wall time.
    """

    layers: tuple[LayerComparison, ...]
    perplexity: PerplexityComparison
    kl: float
    kl_standard_error: float
    kl_largest: float
    top1_agreement: float
    first_difference: tuple[str, str] | None
    first_below: str | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tokens: int
    window: int
    seconds: float


def scheme_of(module: nn.Module) -> str:
    """`w4a8o8` and the like for a quantized layer, `float` for another."""
    if isinstance(module, QuantLinear):
        return module.scheme.label
    bits = getattr(module, "num_bits", None)
    if bits is None:
        return "float"
    sides = ("8" if side_scale(module, side) is not None else "16" for side in ("input", "output"))
    return f"w{bits}a{next(sides)}o{next(sides)}"


class _LayerSums:
    def __init__(self, name: str, a: nn.Module, b: nn.Module) -> None:
        self.name, self.schemes = name, (scheme_of(a), scheme_of(b))
        self.shape = (0, 0)
        self.input = SideSums(side_scale(a, "input"), side_scale(b, "input"))
        self.output = SideSums(side_scale(a, "output"), side_scale(b, "output"))
        self.alone = RatioSums()

    def add(self, a: Visit, b: Visit) -> None:
        if a.x.shape != b.x.shape or a.y.shape != b.y.shape:
            raise ConfigError(f"the two models differ in shape: {_sizes(a)} and {_sizes(b)}", tensor=self.name)
        self.shape = (a.y.shape[-1], a.x.shape[-1])
        self.input.add(a.x, b.x, a.x, b.x)
        self.output.add(a.y, b.y, unclamped(a.module, a.x, a.y), unclamped(b.module, b.x, b.y))
        self.alone.add(a.y, alone(b.module, a.x))

    def result(self) -> LayerComparison:
        return LayerComparison(
            self.name, self.shape, *self.schemes, self.input.result(), self.output.result(), self.alone.sqnr()
        )


def _sizes(visit: Visit) -> str:
    return f"{visit.y.shape[-1]} x {visit.x.shape[-1]}"


def alone(module: nn.Module, x: Tensor) -> Tensor:
    """A layer on an input that is not its model's: past its hooks, in a dtype it takes."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, QuantLinear) and isinstance(weight, Tensor) and weight.dtype.is_floating_point:
        x = x.to(weight.dtype)
    return module.forward(x)  # type: ignore[no-any-return]


class _EndToEnd:
    """Losses, divergence and agreement, one mean a window."""

    def __init__(self) -> None:
        self.losses: tuple[list[float], list[float]] = ([], [])
        self.divergences: list[float] = []
        self.agreeing = 0
        self.largest = 0.0

    def add(self, logits_a: Tensor, logits_b: Tensor, labels: Tensor) -> None:
        step = positions_at_once(logits_a.shape[-1])
        sums = [0.0, 0.0, 0.0]
        for start in range(0, labels.shape[0], step):
            part = slice(start, min(start + step, labels.shape[0]))
            log_a = torch.log_softmax(logits_a[part].to(torch.float32), -1)
            log_b = torch.log_softmax(logits_b[part].to(log_a.device, torch.float32), -1)
            wanted = labels[part, None].to(log_a.device)
            for i, log in enumerate((log_a, log_b)):
                sums[i] -= float(log.gather(1, wanted).sum(dtype=torch.float64))
            found = _divergence(log_a, log_b)
            sums[2] += float(found.sum(dtype=torch.float64))
            self.largest = max(self.largest, float(found.max()))
            self.agreeing += int((log_a.argmax(-1) == log_b.argmax(-1)).sum())
        for kept, total in zip((*self.losses, self.divergences), sums, strict=True):
            kept.append(total)


def _divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL of each row; float32 sums of it can end a rounding below 0, which no divergence is."""
    return (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0)


@torch.inference_mode()
def sensitivity(
    a: Any, b: nn.Module, ids: Tensor, names: Sequence[str], progress: Progress | None = None
) -> dict[str, float]:
    """What each layer does to the whole: KL in nats a token when B's layer, alone, replaces A's.

    Args:
        a: the reference model.
        b: the model the layers are taken from.
        ids: int64 `[n]`, the window that is read once for every layer.
        names: the layers.
        progress: called after each layer.
    """
    layers_a, layers_b = linear_layers(a), linear_layers(b)
    inputs = {"input_ids": ids[None].to(a.device), "use_cache": False}
    log_a = torch.log_softmax(a(**inputs).logits[0].to(torch.float32), -1)
    found = {}
    for done, name in enumerate(names, start=1):

        def replaced(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> Tensor:
            return alone(layers_b[name], args[0]).to(output.dtype)

        handle = layers_a[name].register_forward_hook(replaced)
        try:
            log_b = torch.log_softmax(a(**inputs).logits[0].to(torch.float32), -1)
        finally:
            handle.remove()
        found[name] = float(_divergence(log_a, log_b).mean(dtype=torch.float64))
        if progress is not None:
            progress(done, len(names))
    return found


@torch.inference_mode()
def compare_models(
    a: Any, b: Any, windows: Sequence[Tensor], *, layers: bool = True, progress: Progress | None = None
) -> CompareResult:
    """Compare two models in memory.

    Args:
        a: the reference, any transformers causal language model.
        b: the model to judge, of the same architecture.
        windows: int64 `[length]` token ids each: see `bytelane.quantize.windows`.
        layers: measure the linear layers too.
        progress: called with the windows done and the windows in all.

    Raises:
        ConfigError: the models have no layer in common, or differ in shape.
        ValueError: no window, or one too short to predict anything.
    """
    if not windows or any(w.dim() != 1 or w.numel() < 2 for w in windows):
        raise ValueError("a comparison needs at least one window, and windows of at least 2 token ids")
    started = time.perf_counter()
    layers_a, layers_b = linear_layers(a), linear_layers(b)
    common = [name for name in layers_a if name in layers_b] if layers else []
    if layers and not common:
        raise ConfigError("the two models have no linear layer in common", tensor="compare")
    sums: dict[str, _LayerSums] = {}

    def meet(name: str, visit_a: Visit, visit_b: Visit) -> None:
        if name not in sums:
            sums[name] = _LayerSums(name, layers_a[name], layers_b[name])
        sums[name].add(visit_a, visit_b)

    whole = _EndToEnd()
    with Lockstep(a, b, common, meet) as both:
        for done, window in enumerate(windows, start=1):
            logits_a, logits_b = both.run(window)
            if logits_a.shape != logits_b.shape:
                raise ConfigError(
                    f"the vocabularies differ: {logits_a.shape[-1]} and {logits_b.shape[-1]}", tensor="logits"
                )
            whole.add(logits_a[:-1], logits_b[:-1], window[1:])
            if progress is not None:
                progress(done, len(windows))
    seconds = time.perf_counter() - started
    results = tuple(entry.result() for entry in sums.values())
    counts = [window.numel() - 1 for window in windows]
    tokens = sum(counts)
    scored: list[PerplexityResult] = [result_of(losses, counts, seconds) for losses in whole.losses]
    means = [total / count for total, count in zip(whole.divergences, counts, strict=True)]
    return CompareResult(
        layers=results,
        perplexity=compare_results(*scored),
        kl=math.fsum(whole.divergences) / tokens,
        kl_standard_error=standard_error(means),
        kl_largest=whole.largest,
        top1_agreement=whole.agreeing / tokens,
        first_difference=_first_difference(results),
        first_below=next((r.name for r in results if r.output.sqnr is not None and r.output.sqnr < DIVERGED), None),
        only_a=tuple(name for name in layers_a if name not in layers_b),
        only_b=tuple(name for name in layers_b if name not in layers_a),
        tokens=tokens,
        window=max(counts) + 1,
        seconds=seconds,
    )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; NaN for a single one."""
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)


def _first_difference(layers: Sequence[LayerComparison]) -> tuple[str, str] | None:
    for layer in layers:
        for side, found in (("input", layer.input), ("output", layer.output)):
            if found.differing:
                return layer.name, side
    return None
