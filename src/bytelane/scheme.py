"""What a layer's quantization is: frozen values, no tensors, no behaviour.

The scheme is wNa8o8: N-bit integer weights with symmetric scales, static per-tensor INT8 inputs and outputs.
Everything downstream (storage, layer, op, kernel) is chosen from these values alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from bytelane.errors import AccumulatorError, GroupSizeError, UnsupportedWidthError

MIN_BITS, MAX_BITS = 2, 8

MAX_IN_FEATURES = 131072
"""The longest dot product bytelane accepts: 2^17 products of two int8 codes, each at most 2^14, reach 2^31."""


def accumulator_limit(num_bits: int) -> int:
    """The largest accumulator, bias included, of a layer of N-bit weights: `2^27 - 1` at 4 bits, else `2^31 - 1`.

    The vendor's 4-bit kernels for Arm and for AVX512-VNNI wrap at 28 bits (as an int32 does that counts sixteenths, the
    codes taken in the high half of a byte), where its other x86 kernels wrap at 32. No layer may reach the sums that
    they answer differently, so one result is right everywhere.
    """
    return (1 << 27) - 1 if num_bits == 4 else (1 << 31) - 1


class Storage(enum.Enum):
    """How codes lie in a checkpoint: see FORMAT.md."""

    PACK_QUANTIZED = "pack-quantized"
    """compressed-tensors, int32 words, N bits a code."""
    INT_QUANTIZED = "int-quantized"
    """compressed-tensors, one int8 a code."""
    GEMMA = "gemma"
    """Gemma mobile: uint8 at 2 and 4 bits, int8 at 8."""


class Numerics(enum.Enum):
    """Which arithmetic a layer computes: see `bytelane.numerics`."""

    INTEGER = "integer"
    EMULATED = "emulated"


class Kind(enum.Enum):
    """What sort of module holds the weight."""

    LINEAR = "linear"
    EMBEDDING = "embedding"


def check_bits(num_bits: int) -> None:
    """Refuse a width outside 2..8."""
    if not MIN_BITS <= num_bits <= MAX_BITS:
        raise UnsupportedWidthError(f"num_bits must be {MIN_BITS}..{MAX_BITS}, found {num_bits}", tensor="num_bits")


def code_range(num_bits: int) -> tuple[int, int]:
    """The smallest and the largest signed code of a width: `-2^(N-1), 2^(N-1)-1`."""
    return -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1


def row_bytes(in_features: int, num_bits: int) -> int:
    """Bytes of one densely packed weight row: `ceil(in_features * num_bits / 8)`."""
    return (in_features * num_bits + 7) // 8


@dataclass(frozen=True)
class WeightScheme:
    """Integer weights: `num_bits` wide, one scale per output channel or per group of inputs.

    Attributes:
        num_bits: N, in 2..8.
        group_size: inputs that share a scale; None for one scale per output channel.
    """

    num_bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.num_bits)
        if self.group_size is not None and self.group_size <= 0:
            raise GroupSizeError(f"a group size must be positive, found {self.group_size}")

    @property
    def granularity(self) -> str:
        """`"channel"` or `"group:<size>"`."""
        return "channel" if self.group_size is None else f"group:{self.group_size}"

    def groups(self, in_features: int) -> int:
        """How many scales a row of `in_features` codes has; refuses a group size that does not divide it."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise GroupSizeError(f"the group size {self.group_size} does not divide the {in_features} input features")
        return in_features // self.group_size


@dataclass(frozen=True)
class LinearScheme:
    """A linear layer's quantization: its weights, and which activation sides are quantized.

    A side whose scale is absent, or exactly 0 (not calibrated), is not quantized.
    """

    weight: WeightScheme
    quantize_input: bool = True
    quantize_output: bool = True

    @property
    def label(self) -> str:
        """The field's short name: `w4a8o8`; `a16` and `o16` stand for a side left in the activation dtype."""
        sides = (self.quantize_input, self.quantize_output)
        return f"w{self.weight.num_bits}" + "".join(n + ("8" if s else "16") for n, s in zip("ao", sides, strict=True))


@dataclass(frozen=True)
class EmbeddingScheme:
    """An embedding table's quantization: weights only."""

    weight: WeightScheme

    @property
    def label(self) -> str:
        """The field's short name: `w4`."""
        return f"w{self.weight.num_bits}"


def check_in_features(in_features: int) -> None:
    """Refuse a dot product whose int32 accumulator could overflow."""
    if in_features > MAX_IN_FEATURES:
        raise AccumulatorError(
            f"at most {MAX_IN_FEATURES} input features keep the accumulator in int32, found {in_features}"
        )
