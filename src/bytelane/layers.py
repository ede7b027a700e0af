"""The two layers a quantized model is made of: `QuantLinear` and `QuantEmbedding`.

A layer holds canonical packed rows (`bytelane.packing`) and float32 scales, and calls one operation. It never holds or
makes a dense weight. Scales are buffers that keep float32 through `.to(dtype)`, because the numerics are defined on
them, not on a rounded copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bytelane import ops as _ops  # noqa: F401  (registers torch.ops.bytelane)
from bytelane.dispatch import select
from bytelane.errors import PackedShapeError, TensorShapeError
from bytelane.kernels.cpu import BoundLinear
from bytelane.packing import pack_rows
from bytelane.scheme import EmbeddingScheme, LinearScheme, Numerics, WeightScheme, row_bytes
from bytelane.validation import activation_scale, check_full_length_rows, check_integer_form, weight_scales


class _PackedModule(nn.Module):
    """Canonical packed rows and their float32 scales."""

    packed: Tensor
    weight_scale: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedModule:
        """Follow `.to(device)` but not `.to(dtype)`: scales and bias stay the float32 values they were."""
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def _check_rows(rows: Tensor, num_bits: int, in_features: int) -> None:
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_bytes(in_features, num_bits):
        raise PackedShapeError(
            f"{in_features} codes of {num_bits} bits need uint8 rows of {row_bytes(in_features, num_bits)} bytes, "
            f"found {tuple(rows.shape)} of {rows.dtype}",
            tensor="weight",
        )


class QuantLinear(_PackedModule):
    """A wNa8o8 linear layer: N-bit packed weights, static INT8 input and output.

    Buffers: `packed` uint8 `[out, ceil(in * N / 8)]`, `weight_scale` float32 `[out, groups]`, `input_scale` and
    `output_scale` float32 `[]` or None for a side that is not quantized, `bias` float32 `[out]` or None.

    Called on `[..., in]` in float32, bfloat16 or float16, it returns `[..., out]` in the same dtype.

    Attributes:
        in_features: K.
        out_features: N.
        scheme: what is quantized, and how.
        numerics: `Numerics.INTEGER` (default) or `Numerics.EMULATED`; may be changed at any time.
    """

    input_scale: Tensor | None
    output_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        rows: Tensor,
        weight_scale: Tensor,
        *,
        in_features: int,
        num_bits: int,
        group_size: int | None = None,
        input_scale: Tensor | float | None = None,
        output_scale: Tensor | float | None = None,
        bias: Tensor | None = None,
        numerics: Numerics | str = Numerics.INTEGER,
    ) -> None:
        """Build from canonical rows; see `from_codes` for the arguments and the refusals."""
        super().__init__()
        weight = WeightScheme(num_bits, group_size)
        groups = weight.groups(in_features)
        _check_rows(rows, num_bits, in_features)
        self.in_features = in_features
        self.out_features = rows.shape[0]
        scale = weight_scales(weight_scale, self.out_features, groups, "weight_scale").detach().to(torch.float32)
        s_in = activation_scale(input_scale, "input_scale")
        s_out = activation_scale(output_scale, "output_scale")
        if bias is not None:
            if bias.shape != (self.out_features,):
                raise TensorShapeError(
                    f"a bias must be [{self.out_features}], found {tuple(bias.shape)}", tensor="bias"
                )
            bias = bias.detach().to(torch.float32).contiguous()
        check_integer_form(weight, in_features, scale, s_in, s_out, bias)
        check_full_length_rows(rows, num_bits, in_features)
        self.scheme = LinearScheme(weight, quantize_input=s_in is not None, quantize_output=s_out is not None)
        self.numerics = Numerics(numerics)
        self._bound: BoundLinear | None = None
        self.register_buffer("packed", rows.contiguous())
        self.register_buffer("weight_scale", scale.contiguous())
        self.register_buffer("input_scale", None if s_in is None else s_in.to(rows.device))
        self.register_buffer("output_scale", None if s_out is None else s_out.to(rows.device))
        self.register_buffer("bias", bias)

    @classmethod
    def from_codes(
        cls,
        codes_int8: Tensor,
        weight_scale: Tensor,
        *,
        num_bits: int,
        input_scale: Tensor | float | None = None,
        output_scale: Tensor | float | None = None,
        bias: Tensor | None = None,
        group_size: int | None = None,
        numerics: Numerics | str = Numerics.INTEGER,
    ) -> QuantLinear:
        """Build a layer from signed codes.

        Args:
            codes_int8: int8 `[out, in]`, each in `-2^(N-1) .. 2^(N-1)-1`.
            weight_scale: `[out]`, `[out, 1]` or `[out, in / group_size]`, floating point, not negative.
            num_bits: N, in 2..8.
            input_scale: `s_in`, one element; None or 0 leaves the input unquantized.
            output_scale: `s_out`, one element; None or 0 leaves the output unquantized.
            bias: float `[out]` or None.
            group_size: inputs that share a scale; None for one scale per output channel.
            numerics: `"integer"` (what the phone computes) or `"emulated"` (what vLLM and Hugging Face compute).

        Raises:
            CheckpointError: the class that names the broken rule: `CodeRangeError`, `ScaleError`, `GroupSizeError`,
                `UnsupportedWidthError`, `AccumulatorError`, `TensorShapeError`.
        """
        rows = pack_rows(codes_int8, num_bits)
        return cls(
            rows,
            weight_scale,
            in_features=codes_int8.shape[1],
            num_bits=num_bits,
            group_size=group_size,
            input_scale=input_scale,
            output_scale=output_scale,
            bias=bias,
            numerics=numerics,
        )

    @property
    def num_bits(self) -> int:
        """The weight's width."""
        return self.scheme.weight.num_bits

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None for one scale per output channel."""
        return self.scheme.weight.group_size

    @property
    def weight(self) -> Tensor:
        """The packed codes, for code that asks a linear's weight what it is or where it lies.

        Gemma 4's vision tower casts pixels to the dtype of its first weight if that is a float; it is not one here.
        """
        return self.packed

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        held = self._buffers  # a plain dictionary: attribute access to a buffer costs a microsecond, and this is hot
        packed, scale, bias = held["packed"], held["weight_scale"], held["bias"]
        s_in, s_out = held["input_scale"], held["output_scale"]
        eager = not torch.compiler.is_compiling() and type(x) is Tensor
        # An eager call on a plain tensor takes the kernel that the operation would take, without the dispatcher's
        # detour, which costs as much as a small layer; so do checks of tensors that were checked before.
        if eager and (bound := self._bound) is not None:
            fits = self.numerics is Numerics.INTEGER and x.dtype is bound.dtype and x.is_cpu
            if fits and bound.holds(packed, scale, s_in, s_out, bias):
                return bound.run(x)
        weight, ops = self.scheme.weight, torch.ops.bytelane
        if self.numerics is Numerics.EMULATED:
            return ops.linear_emulated(x, packed, scale, s_in, s_out, bias, weight.num_bits)  # type: ignore[no-any-return]
        if s_in is None:
            return ops.linear_weight_only(x, packed, scale, s_out, bias, weight.num_bits)  # type: ignore[no-any-return]
        arguments = (packed, scale, s_in, s_out, bias, weight.num_bits, weight.group_size or 0)
        if not eager:
            return ops.linear(x, *arguments)  # type: ignore[no-any-return]
        rows = x.numel() // self.in_features
        kernel = select("linear", x.device.type, x.dtype, *arguments[5:], rows)
        if kernel.bind is None:
            return kernel.run(x, *arguments)
        self._bound = kernel.bind(x.dtype, self.in_features, *arguments)
        return self._bound(x)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes over: not the addresses of this one's tensors."""
        return self.__dict__ | {"_bound": None}

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.label}, "
            f"{self.scheme.weight.granularity}, bias={self.bias is not None}, {self.numerics.value}"
        )


class PackedTable:
    """What other code may ask of `QuantEmbedding.weight`: its dtype, shape and place, and rows by index.

    `weight[ids]` and `weight[ids, columns]` dequantize the rows asked for, without the architecture's `embed_scale`, as
    indexing a float table would. Anything that needs all of the table is refused: it never exists in float.
    """

    def __init__(self, table: QuantEmbedding) -> None:
        self._table = table

    @property
    def shape(self) -> torch.Size:
        """`(num_embeddings, embedding_dim)`."""
        return torch.Size((self._table.num_embeddings, self._table.embedding_dim))

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that indexing gives."""
        return self._table.dtype

    @property
    def device(self) -> torch.device:
        """Where the packed rows are."""
        return self._table.packed.device

    @property
    def requires_grad(self) -> bool:
        """Never: the codes are constants."""
        return False

    def __getitem__(self, index: int | Tensor | tuple[int | Tensor, int | slice]) -> Tensor:
        """Dequantized rows.

        Raises:
            TypeError: an index other than `[ids]` or `[ids, columns]`.
            IndexError: no such row.
        """
        rows, columns = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
        integers = isinstance(rows, int) or (
            isinstance(rows, Tensor) and not rows.dtype.is_floating_point and rows.dtype != torch.bool
        )
        if not integers or not isinstance(columns, int | slice):
            raise TypeError(
                "a packed embedding table gives rows by integer index and never itself as a whole; a model called with "
                "inputs_embeds needs input_ids or per_layer_inputs beside them"
            )
        count = self._table.num_embeddings
        ids = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        return self._table.rows(torch.where(ids < 0, ids + count, ids))[..., columns]


class QuantEmbedding(_PackedModule):
    """An embedding table of N-bit packed rows; only the rows asked for are dequantized.

    Buffers: `packed` uint8 `[num_embeddings, ceil(dim * N / 8)]`, which may be a view of a memory-mapped file, and
    `weight_scale` float32 `[num_embeddings, groups]`.

    Attributes:
        num_embeddings: rows.
        embedding_dim: codes in a row.
        scheme: the table's quantization.
        embed_scale: the architecture's own factor, applied after the dequantization; 1 for most.
        dtype: of the result.
    """

    def __init__(
        self,
        rows: Tensor,
        weight_scale: Tensor,
        *,
        embedding_dim: int,
        num_bits: int,
        group_size: int | None = None,
        embed_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build from canonical rows.

        Raises:
            CheckpointError: as for `QuantLinear`.
        """
        super().__init__()
        weight = WeightScheme(num_bits, group_size)
        _check_rows(rows, num_bits, embedding_dim)
        groups = weight.groups(embedding_dim)
        scale = weight_scales(weight_scale, rows.shape[0], groups, "weight_scale").detach().to(torch.float32)
        self.num_embeddings = rows.shape[0]
        self.embedding_dim = embedding_dim
        self.scheme = EmbeddingScheme(weight)
        self.embed_scale = embed_scale
        self.dtype = dtype
        self.register_buffer("packed", rows)
        self.register_buffer("weight_scale", scale)

    @property
    def num_bits(self) -> int:
        """The table's width."""
        return self.scheme.weight.num_bits

    @property
    def weight(self) -> PackedTable:
        """The table as other code expects it: rows by index, the whole never."""
        return PackedTable(self)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows without `embed_scale`: `[..., embedding_dim]` in `dtype`."""
        return torch.ops.bytelane.embedding(  # type: ignore[no-any-return]
            ids, self.packed, self.weight_scale, self.num_bits, self.embedding_dim, 1.0, self.dtype
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids of any shape to `[..., embedding_dim]` in `dtype`."""
        return torch.ops.bytelane.embedding(  # type: ignore[no-any-return]
            ids, self.packed, self.weight_scale, self.num_bits, self.embedding_dim, self.embed_scale, self.dtype
        )

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.label}, {self.scheme.weight.granularity}, "
            f"embed_scale={self.embed_scale:g}, {self.dtype}"
        )
