"""What one rank holds of one checkpoint module: taken tensor by tensor from vLLM's stream, cut, checked, sealed.

vLLM's layers merge modules (q/k/v, gate/up) and split them over ranks. A `Part` is one module of the checkpoint seen by
one rank: it knows which rows and which inputs of the whole are this rank's. Rows are cut before they are copied, so a
rank reads little more than its share; inputs are cut from the packed rows, through the codes only where a cut falls
inside a byte. Everything is held to the rules of `bytelane.validation` when the part is sealed, and refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bytelane.checkpoint.layout import ModuleLayout
from bytelane.checkpoint.rows import clear_padding, read_rows
from bytelane.errors import (
    CheckpointError,
    GroupSizeError,
    MissingTensorError,
    PackedShapeError,
    ShardingError,
    TensorDtypeError,
    TensorShapeError,
    WeightShapeError,
)
from bytelane.packing import pack_rows, stored_shape, unpack_rows
from bytelane.scheme import Kind, Storage, WeightScheme, row_bytes
from bytelane.validation import activation_scale, check_full_length_rows, check_integer_form, weight_scales

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Span:
    """A contiguous piece of a dimension: `size` of `whole` elements from `start`."""

    start: int
    size: int
    whole: int

    @classmethod
    def shard(cls, size: int, whole: int, rank: int, ranks: int, name: str) -> Span:
        """The piece of `size` that a rank has of `whole`.

        `whole / size` is the number of different pieces; where there are fewer than ranks (key and value heads that
        several ranks share, layers that are not split at all), consecutive ranks have the same one.

        Raises:
            ShardingError: the pieces do not come out even.
        """
        pieces = whole // size if size else 0
        if not pieces or pieces * size != whole or ranks % pieces:
            raise ShardingError(f"{whole} cannot be split over {ranks} ranks in pieces of {size}", tensor=name)
        return cls(rank // (ranks // pieces) * size, size, whole)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return self.size == self.whole

    @property
    def slice(self) -> slice:
        """For indexing."""
        return slice(self.start, self.start + self.size)


def cut_inputs(rows: Tensor, num_bits: int, span: Span) -> Tensor:
    """Canonical rows of some of the inputs: uint8 `[out, ceil(whole * N / 8)]` to `[out, ceil(size * N / 8)]`."""
    if span.is_whole:
        return rows
    first_bit = span.start * num_bits
    if first_bit % 8:
        return pack_rows(unpack_rows(rows, num_bits, span.whole)[:, span.slice], num_bits)
    cut = rows[:, first_bit // 8 : first_bit // 8 + row_bytes(span.size, num_bits)]
    return clear_padding(cut, num_bits, span.size).contiguous()


@dataclass(frozen=True)
class Sealed:
    """A part ready to run.

    Attributes:
        rows: uint8 `[out, ceil(in * N / 8)]`, this rank's.
        weight_scale: float32 `[out, groups]`, this rank's.
        input_scale: float32 `[]` or None.
        output_scale: float32 `[]` or None.
        bias: float32 `[out]` or None; of all outputs this rank computes.
    """

    rows: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    output_scale: Tensor | None
    bias: Tensor | None


class Part:
    """One module of the checkpoint, as one rank takes it.

    Args:
        layout: how the module is stored.
        outputs: this rank's output rows of the module's.
        inputs: this rank's inputs of the module's.
        padded: rows the rank keeps, `outputs.size` or more; the rest are zero (a vocabulary's padding).
        source: the model's folder or id, for errors.
    """

    def __init__(
        self, layout: ModuleLayout, outputs: Span, inputs: Span, source: Path, *, padded: int | None = None
    ) -> None:
        size = layout.group_size
        if size is not None and (inputs.start % size or inputs.size % size):
            raise ShardingError(
                f"a rank's {inputs.size} inputs are not whole groups of {size}, and a group cannot be split",
                file=source,
                tensor=layout.name,
            )
        self.layout = layout
        self.outputs = outputs
        self.inputs = inputs
        self.source = source
        self.padded = outputs.size if padded is None else padded
        self._taken: dict[str, Tensor] = {}

    @property
    def leaves(self) -> dict[str, str]:
        """The last parts of the stored tensors' names, by role."""
        roles = {
            "weight": self.layout.weight,
            "scale": self.layout.scale,
            "shape": self.layout.weight_shape,
            "input": self.layout.input_scale,
            "output": self.layout.output_scale,
        }
        cut = len(self.layout.name) + 1
        return {role: name[cut:] for role, name in roles.items() if name is not None}

    def _named(self, role: str) -> str:
        return f"{self.layout.name}.{self.leaves.get(role, role)}"

    def _refused(self, kind: type[CheckpointError], rule: str, role: str) -> CheckpointError:
        return kind(rule, file=self.source, tensor=self._named(role))

    def take(self, role: str, tensor: Tensor) -> None:
        """One stored tensor of the module, whole; keeps this rank's piece of it.

        Raises:
            CheckpointError: the class that names the broken rule.
        """
        piece = getattr(self, f"_take_{role}")(tensor)
        self._taken[role] = piece

    def _take_weight(self, stored: Tensor) -> Tensor:
        layout, (whole, columns) = self.layout, (self.outputs.whole, self.inputs.whole)
        packed, gemma = layout.storage is Storage.PACK_QUANTIZED, layout.storage is Storage.GEMMA
        wanted = torch.int32 if packed else torch.uint8 if gemma and layout.num_bits < 8 else torch.int8
        if stored.dtype != wanted:
            raise self._refused(TensorDtypeError, f"codes must be {wanted}, found {stored.dtype}", "weight")
        allowed = stored_shape(whole, columns, layout.num_bits, layout.storage)
        if tuple(stored.shape) not in allowed:
            kind = TensorShapeError if wanted is torch.int8 else PackedShapeError
            shapes = " or ".join(str(list(s)) for s in allowed)
            raise self._refused(kind, f"must be {shapes}, found {list(stored.shape)}", "weight")
        try:
            rows = read_rows(stored[self.outputs.slice], layout)
            check_full_length_rows(rows, layout.num_bits, columns)
        except CheckpointError as error:
            raise error.within(self.source, self._named("weight")) from error
        # Memory of its own: what vLLM hands over may be a view of the file.
        return torch.clone(cut_inputs(rows, layout.num_bits, self.inputs), memory_format=torch.contiguous_format)

    def _take_scale(self, scale: Tensor) -> Tensor:
        size, columns = self.layout.group_size, self.inputs.whole
        groups = 1 if size is None else columns // size
        try:
            checked = weight_scales(scale, self.outputs.whole, groups, self._named("scale"))
        except CheckpointError as error:
            raise error.within(self.source) from error
        cut = checked[self.outputs.slice]
        if size is not None:
            cut = cut[:, self.inputs.start // size : (self.inputs.start + self.inputs.size) // size]
        return torch.clone(cut, memory_format=torch.contiguous_format).to(torch.float32)

    def _take_shape(self, shape: Tensor) -> Tensor:
        wanted = [self.outputs.whole, self.inputs.whole]
        if shape.tolist() != wanted:
            raise self._refused(WeightShapeError, f"must be the model's {wanted}, found {shape.tolist()}", "shape")
        return shape.clone()

    def _take_activation(self, scale: Tensor, role: str) -> Tensor:
        try:
            found = activation_scale(scale, self._named(role))
        except CheckpointError as error:
            raise error.within(self.source) from error
        return torch.zeros((), dtype=torch.float32, device=scale.device) if found is None else found.clone()

    def _take_input(self, scale: Tensor) -> Tensor:
        return self._take_activation(scale, "input")

    def _take_output(self, scale: Tensor) -> Tensor:
        return self._take_activation(scale, "output")

    def _take_bias(self, bias: Tensor) -> Tensor:
        if tuple(bias.shape) != (self.outputs.whole,) or bias.dtype not in FLOATS:
            found = f"{list(bias.shape)} of {bias.dtype}"
            raise self._refused(TensorShapeError, f"must be float [{self.outputs.whole}], found {found}", "bias")
        return bias[self.outputs.slice].to(torch.float32, copy=True)

    @property
    def has_bias(self) -> bool:
        """Whether a stored bias was taken."""
        return "bias" in self._taken

    def _required(self, role: str) -> Tensor:
        if role not in self._taken:
            raise self._refused(MissingTensorError, "the checkpoint does not have it", role)
        return self._taken[role]

    def _side(self, role: str) -> Tensor | None:
        """A calibrated activation scale; None for a side that is not quantized."""
        if role not in self.leaves or (self.layout.optional_activations and role not in self._taken):
            return None
        scale = self._required(role)
        return None if float(scale) == 0 else scale

    def seal(self, bias: Tensor | None = None) -> Sealed:
        """Check the whole and let go of it.

        Args:
            bias: float `[out]` of this rank, where vLLM loaded it elsewhere.

        Raises:
            CheckpointError: the class that names the broken rule.
        """
        layout = self.layout
        rows, scale = self._required("weight"), self._required("scale")
        if layout.weight_shape is not None:
            self._required("shape")
        input_scale, output_scale = self._side("input"), self._side("output")
        if "bias" in self._taken:
            bias = self._taken["bias"]
        weight = WeightScheme(layout.num_bits, layout.group_size)
        if scale.shape[1] != weight.groups(self.inputs.size):
            raise self._refused(GroupSizeError, f"{scale.shape[1]} groups do not fit {self.inputs.size}", "scale")
        if layout.kind is Kind.LINEAR:
            try:
                check_integer_form(weight, self.inputs.whole, scale, input_scale, output_scale, bias)
            except CheckpointError as error:
                raise error.within(self.source, layout.name) from error
        self._taken = {}
        missing = self.padded - rows.shape[0]
        if missing:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
            scale = torch.nn.functional.pad(scale, (0, 0, 0, missing))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, missing))
        bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        return Sealed(rows, scale, input_scale, output_scale, bias)
