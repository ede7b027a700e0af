"""Activation ranges: what goes into and comes out of each linear layer while the float model reads calibration text.

For every tensor the smallest and the largest value are kept, and, where percentiles are wanted, a histogram of `|x|`
over the bfloat16 bit patterns. Positive bfloat16 values sort as their bits do, so `x.abs().bfloat16().view(int16)` is
the index of one of 32768 bins. Activations that are bfloat16 are counted exactly; others are rounded to 8 significant
bits, a relative error of at most 2^-8. A histogram takes 256 KiB however long the text is.

Layers that read the same tensor (query, key and value; gate and up) share one input range and thereby one input scale,
so that a runtime which merges them quantizes the tensor once. They are found by the identity of the tensor object
during a forward pass, not by their names: all inputs are held until the pass ends so that no identity is reused, and a
tensor's version is part of its identity so that writing to it in place makes it another one. A pass therefore holds the
inputs of all observed layers for one batch of windows, as training would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from bytelane.errors import QuantizeError

NUM_BINS = 1 << 15
_INFINITY_BIN = 0x7F80
CODE_MAX = 127
"""The code that the end of an activation range falls on."""


class CalibrationError(QuantizeError):
    """The text gives a layer no usable range."""


@dataclass
class Statistics:
    """What is known of one tensor, over all tokens so far.

    Attributes:
        low: smallest value.
        high: largest value.
        count: how many values.
        histogram: int64 `[32768]`, counts of `|x|` by bfloat16 bit pattern; None where it is not kept.
    """

    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    histogram: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, *, histogram: bool) -> Statistics:
        """The statistics of one tensor of any shape and floating dtype."""
        if not x.numel():
            return cls(histogram=torch.zeros(NUM_BINS, dtype=torch.int64) if histogram else None)
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            return cls(low, high, x.numel())  # refused by the caller, which knows the layer
        bins = None
        if histogram:
            patterns = x.detach().abs().to(torch.bfloat16).view(torch.int16).flatten().to(torch.int32)
            bins = torch.bincount(patterns, minlength=NUM_BINS).cpu()
        return cls(low, high, x.numel(), bins)

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity was seen."""
        return not self.count or (math.isfinite(self.low) and math.isfinite(self.high))

    def add(self, other: Statistics) -> None:
        """Take in more values."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count
        if other.histogram is not None:
            self.histogram = other.histogram + (0 if self.histogram is None else self.histogram)

    def amax(self) -> float:
        """The largest `|x|`, exact."""
        return max(abs(self.low), abs(self.high))

    def percentile(self, percent: float) -> float:
        """The smallest bin value `v` with at least `percent` % of `|x| <= v`, at most `amax`.

        Within a relative 2^-8 of the exact order statistic (exact for bfloat16 activations).
        """
        if self.histogram is None:
            raise ValueError("percentiles need a histogram")
        wanted = math.ceil(int(self.histogram.sum()) * percent / 100)
        found = int(torch.searchsorted(self.histogram.cumsum(0), max(wanted, 1)))
        if found >= _INFINITY_BIN:
            return self.amax()
        value = torch.tensor([found], dtype=torch.int16).view(torch.bfloat16)
        return min(float(value), self.amax())

    def least_squares(self) -> float:
        """The range end `L` with the least mean squared error of int8 rounding and clipping, at most `amax`.

        With the step `s = L / 127` a value costs `x^2` below half a step, `s^2 / 12` (uniform rounding error) up to
        `L`, and `(|x| - L)^2` beyond. Ends are tried every eighth of an octave, twelve octaves down from `amax`.
        """
        if self.histogram is None:
            raise ValueError("least squares need a histogram")
        used = self.histogram.nonzero().flatten()
        used = used[used < _INFINITY_BIN]
        values = used.to(torch.int16).view(torch.bfloat16).to(torch.float64)
        counts = self.histogram[used].to(torch.float64)
        best, least = self.amax(), math.inf
        for eighths in range(8 * 12):
            limit = self.amax() * 2.0 ** (-eighths / 8)
            step = limit / CODE_MAX
            rounding = torch.where(values < step / 2, values.square(), step**2 / 12)
            cost = torch.where(values > limit, (values - limit).square(), rounding)
            total = float((cost * counts).sum())
            if total < least:
                best, least = limit, total
        return best

    def clipped(self, limit: float) -> float:
        """The share of `|x|` beyond `limit`, 0 to 1, to the resolution of the bins."""
        if self.amax() <= limit:
            return 0.0
        if self.histogram is None:
            raise ValueError("clip shares need a histogram")
        pattern = int(torch.tensor([limit]).to(torch.bfloat16).view(torch.int16))
        return int(self.histogram[pattern + 1 :].sum()) / int(self.histogram.sum())


@dataclass(frozen=True)
class Observations:
    """What calibration saw.

    Attributes:
        inputs: the statistics of each layer's input; layers that share an input share the object.
        outputs: the statistics of each layer's output.
        shared: the groups of two or more layers that read the same tensor, in the model's order.
        tokens: tokens read.
    """

    inputs: dict[str, Statistics]
    outputs: dict[str, Statistics]
    shared: tuple[tuple[str, ...], ...]
    tokens: int


@dataclass
class _Read:
    """One tensor of a forward pass: itself (so that its identity stays its own), what it held, who read it."""

    tensor: Tensor
    statistics: Statistics
    readers: list[str] = field(default_factory=list)


class Observer:
    """Hooks on the layers to observe; use as a context manager, run the model inside.

    Args:
        layers: the layers by name.
        input_histograms: the layers whose inputs need the histogram of a percentile.
        output_histograms: likewise for outputs.

    Attributes:
        by_readers: what was seen of inputs, by the layers that read them together, in whole passes.
        outputs: likewise of outputs, by layer.
        tokens: read in whole passes.
    """

    def __init__(
        self, layers: dict[str, nn.Linear], *, input_histograms: Collection[str], output_histograms: Collection[str]
    ) -> None:
        self._layers = layers
        self._input_histograms = frozenset(input_histograms)
        self._output_histograms = frozenset(output_histograms)
        self._pass: dict[tuple[int, int], _Read] = {}
        self._written: list[tuple[str, Statistics]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.by_readers: dict[tuple[str, ...], Statistics] = {}
        self.outputs = {name: Statistics() for name in layers}
        self.tokens = 0

    def __enter__(self) -> Observer:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._input_hook(name), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._output_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self._read(args[0] if args else kwargs["input"], name)

        return hook

    def _read(self, x: Tensor, name: str) -> None:
        """Count a tensor when it is first read (it may be written to later), or when a histogram is first wanted."""
        kept = name in self._input_histograms
        read = self._pass.get((id(x), x._version))
        if read is None:
            read = _Read(x, self._statistics(x, name, "input", histogram=kept))
            self._pass[id(x), x._version] = read
        elif kept and read.statistics.histogram is None:
            read.statistics = self._statistics(x, name, "input", histogram=True)
        if name not in read.readers:
            read.readers.append(name)

    def _output_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            kept = name in self._output_histograms
            self._written.append((name, self._statistics(output, name, "output", histogram=kept)))

        return hook

    def _statistics(self, x: Tensor, name: str, side: str, *, histogram: bool) -> Statistics:
        found = Statistics.of(x, histogram=histogram)
        if not found.finite:
            raise CalibrationError(
                f"{name}: its {side} holds NaN or infinity in the float model; run it in a wider dtype (dtype=float32)"
            )
        return found

    def end_pass(self, tokens: int) -> None:
        """Count the forward pass that just ended, its inputs under the sets of layers that read them, and let go."""
        for read in self._pass.values():
            self.take("input", tuple(read.readers), read.statistics)
        for name, statistics in self._written:
            self.take("output", (name,), statistics)
        self._pass, self._written = {}, []
        self.tokens += tokens

    def take(self, side: str, names: tuple[str, ...], statistics: Statistics) -> None:
        """Add statistics of what these layers read together, or one of them wrote.

        Raises:
            ValueError: a layer that is not observed, or a side that is neither `"input"` nor `"output"`.
        """
        if side not in ("input", "output") or not names or not set(names) <= set(self._layers):
            raise ValueError(f"no such side: {side} of {', '.join(names)}")
        if side == "input":
            self.by_readers.setdefault(names, Statistics()).add(statistics)
        else:
            self.outputs[names[0]].add(statistics)

    def result(self) -> Observations:
        """Unite the readers over all passes.

        Raises:
            CalibrationError: the text never reached a layer.
        """
        group = {name: name for name in self._layers}  # union-find, by the earliest layer

        def root(name: str) -> str:
            while group[name] != name:
                name = group[name]
            return name

        order = {name: i for i, name in enumerate(self._layers)}
        for readers in self.by_readers:
            roots = sorted({root(name) for name in readers}, key=order.__getitem__)
            group.update(dict.fromkeys(roots, roots[0]))
        united = {name: Statistics() for name in self._layers if group[name] == name}
        for readers, statistics in self.by_readers.items():
            united[root(readers[0])].add(statistics)
        inputs = {name: united[root(name)] for name in self._layers}
        missed = [name for name in self._layers if not inputs[name].count]
        if missed:
            raise CalibrationError(
                f"the calibration text never reached {len(missed)} layer(s), first {missed[0]}; add text that does, "
                f"or leave them unquantized with an `ignore` pattern"
            )
        members = {head: tuple(name for name in self._layers if root(name) == head) for head in united}
        shared = tuple(names for names in members.values() if len(names) > 1)
        return Observations(inputs, dict(self.outputs), shared, self.tokens)


class Resume(Protocol):
    """How an observation outlives its process: `bytelane.quantize.resume.ObservationFile`."""

    def load(self, observer: Observer) -> int:
        """Give the observer what was seen before; returns in how many windows."""

    def seen(self, observer: Observer, windows: int) -> None:
        """So many windows have been read."""

    def save(self, observer: Observer) -> None:
        """Keep what the observer has."""


@torch.no_grad()
def observe(
    model: nn.Module,
    windows: Iterable[Tensor],
    names: Sequence[str],
    *,
    input_histograms: Collection[str] = (),
    output_histograms: Collection[str] = (),
    resume: Resume | None = None,
    progress: Callable[[int], None] | None = None,
) -> Observations:
    """Run the float model over windows and collect the ranges of its linear layers.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        windows: int64 `[length]` token ids each, read one at a time.
        names: the `nn.Linear` modules to observe.
        input_histograms: the layers whose inputs need a percentile, and so the histogram it is read from. A histogram
            costs several times what the smallest and largest value do.
        output_histograms: likewise for outputs.
        resume: what was seen in the first windows already, and how to keep what is seen.
        progress: called with the number of windows read so far.

    Raises:
        CalibrationError: a layer was never reached, or held NaN or infinity.
        ResumeError: what should be resumed is of something else.
    """
    layers = {name: _linear(model, name) for name in names}
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with Observer(layers, input_histograms=input_histograms, output_histograms=output_histograms) as observer:
            before = resume.load(observer) if resume is not None else 0
            for done, window in enumerate(windows, start=1):
                if done > before:
                    model(input_ids=window[None].to(device), use_cache=False)
                    observer.end_pass(window.numel())
                    if resume is not None:
                        resume.seen(observer, done)
                if progress is not None:
                    progress(done)
            if resume is not None:
                resume.save(observer)
    finally:
        model.train(training)
    return observer.result()


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}; only nn.Linear layers are observed")
    return module


def range_scale(limit: float, name: str, side: str) -> Tensor:
    """The symmetric scale of a range: float32 `[]`, `limit / 127`.

    Raises:
        CalibrationError: the limit gives no positive, normal float32 scale.
    """
    scale = torch.tensor(limit, dtype=torch.float32) / CODE_MAX
    if not float(scale) >= torch.finfo(torch.float32).tiny:
        raise CalibrationError(
            f"{name}: the range of its {side} is {limit}, too small for a scale; use a higher percentile or minmax, "
            f"or leave the side unquantized with a `no_{side}` pattern"
        )
    return scale
