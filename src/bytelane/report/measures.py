"""What is measured where two models meet: sums that grow with every window and never hold an activation.

Of a layer's side (its input, its output) with values a of the first model and b of the second, over all tokens:

    SQNR = 10 log10( sum a^2 / sum (a - b)^2 )      dB, sums in float64

Of each model by itself: the smallest and the largest value before any clamp, and, where the side has a static scale s,
the histogram of the 256 int8 codes and the share of values whose rounded code lies below -128 or above 127, which is
what the clamp cuts off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bytelane import numerics
from bytelane.layers import QuantLinear
from bytelane.scheme import Numerics

CODES = 256


@dataclass(frozen=True)
class RunSide:
    """One side of one layer in one model.

    Attributes:
        scale: the static scale, or None for a side in float.
        low: the smallest value seen, before the clamp where there is one.
        high: the largest value.
        clipped_low: the share of values that the clamp raised to code -128; None without a scale, or where the layer
            does not show its values before the clamp.
        clipped_high: likewise, lowered to 127.
        histogram: how often each code -128..127 occurred; None without a scale.
    """

    scale: float | None
    low: float
    high: float
    clipped_low: float | None = None
    clipped_high: float | None = None
    histogram: tuple[int, ...] | None = None

    @property
    def range_used(self) -> float | None:
        """The largest `|value|` over what 127 steps reach: over 1 clips, far under 1 wastes codes."""
        return None if self.scale is None else max(abs(self.low), abs(self.high)) / (127 * self.scale)

    @property
    def clipped(self) -> float:
        """The share clipped on either side; 0 where none is known."""
        return (self.clipped_low or 0.0) + (self.clipped_high or 0.0)


@dataclass(frozen=True)
class SideComparison:
    """One side of one layer in both models.

    Attributes:
        sqnr: in dB; None where the two are equal.
        differing: the share of elements that differ: of codes where both sides have a scale, else of values.
        largest_code: the largest difference of codes; None unless both sides have a scale.
        largest_value: the largest absolute difference of values.
        non_finite: elements that are NaN or infinite in either model; the other figures leave them out.
        a: the first model.
        b: the second.
    """

    sqnr: float | None
    differing: float
    largest_code: int | None
    largest_value: float
    non_finite: int
    a: RunSide
    b: RunSide


def decibels(signal: float, noise: float) -> float | None:
    """The ratio of two energies in dB, None for no noise at all."""
    return None if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def side_scale(module: nn.Module, side: str) -> Tensor | None:
    """A layer's static scale, bytelane's or transformers', as float32 `[]`; None for a side in float."""
    for name in (f"{side}_scale", f"{side}_activation_scale"):
        scale = getattr(module, name, None)
        if scale is not None:
            return scale.detach().to(torch.float32).reshape(()) if float(scale) else None
    return None


def unclamped(module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """A layer's output before its clamp; `y` where there is no clamp, None where the layer does not show it."""
    if side_scale(module, "output") is None:
        return y
    if not isinstance(module, QuantLinear):
        return None
    ops, bits = torch.ops.bytelane, module.num_bits
    arguments = (x, module.packed, module.weight_scale)
    if module.numerics is Numerics.EMULATED:
        found = ops.linear_emulated(*arguments, module.input_scale, None, module.bias, bits)
    elif module.input_scale is None:
        found = ops.linear_weight_only(*arguments, None, module.bias, bits)
    else:
        found = ops.linear(*arguments, module.input_scale, None, module.bias, bits, module.group_size or 0)
    return found  # type: ignore[no-any-return]


@dataclass
class _RunSums:
    """The growing form of `RunSide`."""

    scale: Tensor | None
    low: float = math.inf
    high: float = -math.inf
    below: int = 0
    above: int = 0
    shown: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(CODES, dtype=torch.int64))

    def add(self, values: Tensor, raw: Tensor | None) -> Tensor | None:
        """Take in values after the clamp and (`raw`) before it; returns the int8 codes, or None without a scale."""
        seen = values if raw is None else raw
        finite = seen if bool(torch.isfinite(seen.sum())) else seen[torch.isfinite(seen)]
        if finite.numel():
            low, high = (float(v) for v in finite.aminmax())
            self.low, self.high = min(self.low, low), max(self.high, high)
        if self.scale is None:
            return None
        codes = numerics.quantize(values, self.scale.to(values.device))
        self.counts += torch.bincount(codes.flatten().to(torch.int16) + CODES // 2, minlength=CODES).cpu()
        if raw is not None:
            steps = torch.round(raw.to(torch.float32) / self.scale.to(raw.device))
            self.below += int((steps < numerics.QMIN).sum())
            self.above += int((steps > numerics.QMAX).sum())
            self.shown += raw.numel()
        return codes

    def result(self) -> RunSide:
        """What has been seen so far."""
        low, high = (self.low, self.high) if self.low <= self.high else (0.0, 0.0)
        if self.scale is None:
            return RunSide(None, low, high)
        below, above = (None, None) if not self.shown else (self.below / self.shown, self.above / self.shown)
        return RunSide(float(self.scale), low, high, below, above, tuple(self.counts.tolist()))


class SideSums:
    """The growing form of `SideComparison`."""

    def __init__(self, scale_a: Tensor | None, scale_b: Tensor | None) -> None:
        self._runs = (_RunSums(scale_a), _RunSums(scale_b))
        self._signal = self._noise = 0.0
        self._elements = self._differing = self._non_finite = 0
        self._largest_code: int | None = None
        self._largest_value = 0.0

    def add(self, a: Tensor, b: Tensor, raw_a: Tensor | None, raw_b: Tensor | None) -> None:
        """Take in values of equal shape; `raw_*` are those before the clamp, None where unknown."""
        codes_a, codes_b = self._runs[0].add(a, raw_a), self._runs[1].add(b, raw_b)
        left, right = a.to(torch.float32), b.to(a.device, torch.float32)
        gap = left - right
        noise = float(gap.square().sum(dtype=torch.float64))
        if not math.isfinite(noise):
            finite = torch.isfinite(left) & torch.isfinite(right)
            self._non_finite += int((~finite).sum())
            left, right = left[finite], right[finite]
            gap = left - right
            noise = float(gap.square().sum(dtype=torch.float64))
        self._noise += noise
        self._signal += float(left.square().sum(dtype=torch.float64))
        self._largest_value = max(self._largest_value, float(gap.abs().max()) if gap.numel() else 0.0)
        self._elements += a.numel()
        if codes_a is None or codes_b is None:
            self._differing += int((gap != 0).sum()) + a.numel() - gap.numel()
            return
        steps = (codes_a.to(torch.int16) - codes_b.to(codes_a.device, torch.int16)).abs()
        self._differing += int((steps != 0).sum())
        self._largest_code = max(self._largest_code or 0, int(steps.max()) if steps.numel() else 0)

    def result(self) -> SideComparison:
        """What has been seen so far."""
        return SideComparison(
            sqnr=decibels(self._signal, self._noise),
            differing=self._differing / self._elements if self._elements else 0.0,
            largest_code=self._largest_code,
            largest_value=self._largest_value,
            non_finite=self._non_finite,
            a=self._runs[0].result(),
            b=self._runs[1].result(),
        )


class RatioSums:
    """Signal and noise of one pair of tensors, over windows."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Take in tensors of equal shape; elements that are not finite in either are left out."""
        left, right = reference.to(torch.float32), other.to(reference.device, torch.float32)
        gap = torch.nan_to_num(left - right, 0.0, 0.0, 0.0)
        self._noise += float(gap.square().sum(dtype=torch.float64))
        self._signal += float(torch.nan_to_num(left, 0.0, 0.0, 0.0).square().sum(dtype=torch.float64))

    def sqnr(self) -> float | None:
        """In dB; None for equal tensors."""
        return decibels(self._signal, self._noise)
