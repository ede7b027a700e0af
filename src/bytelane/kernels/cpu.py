"""The native CPU kernels on torch tensors: checks, the output tensor, addresses.

`isa` is one of `supported_isas()`; `path` is `"packed"`, which dots the canonical rows in place (2, 4 or 8 bits, one
scale per output channel or groups of 8, 16, 32 or whole multiples of 64 bytes), or `"unpacked"`, which first spreads a
few rows to bytes (any width, any groups). Whatever the choice, the thread count and M, the results are the bits of
`bytelane.numerics`; `linear_weight_only` alone may differ from it in the last place, and is the same bits whatever the
choice all the same.

The argument order is that of `torch.ops.bytelane`. Scales and biases are float32; activations are made contiguous where
they are not; weights must be. A tensor that does not fit raises ValueError, and so does a width or a group size that
a path does not take and an instruction set that this processor lacks.
"""

from __future__ import annotations

import math
from types import MappingProxyType

# torch comes first on purpose: its OpenMP runtime is loaded then, and the kernels share that pool of threads
import torch
from torch import Tensor

from bytelane import _native
from bytelane.memory import streamed_empty

PACKED_BITS = (2, 4, 8)
"""The widths of the packed path."""

GROUP_BITS = 512
"""A group of the packed path is a whole multiple of this many bits,"""

PART_BITS = frozenset({64, 128, 256})
"""or this many."""

PATHS = MappingProxyType({"packed": 0, "unpacked": 1})
_DTYPES = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
_ISAS = MappingProxyType({name: index for index, name in enumerate(_native.isas())})


def compiled_isas() -> tuple[str, ...]:
    """The instruction sets this build has kernels for, best first."""
    return tuple(_ISAS)


def supported_isas() -> tuple[str, ...]:
    """Those of `compiled_isas` that this processor can run."""
    return tuple(name for name in _ISAS if _native.supported(name))


def dtype_code(dtype: torch.dtype) -> int:
    """The native code of an activation dtype."""
    code = _DTYPES.get(dtype)
    if code is None:
        raise ValueError(f"activations must be float32, bfloat16 or float16, found {dtype}")
    return code


def isa_code(isa: str) -> int:
    """The native index of an instruction set of this build."""
    code = _ISAS.get(isa)
    if code is None:
        raise ValueError(f"isa must be one of {', '.join(_ISAS)}, found {isa!r}")
    return code


def path_code(path: str) -> int:
    """The native code of a matmul path."""
    code = PATHS.get(path)
    if code is None:
        raise ValueError(f"path must be packed or unpacked, found {path!r}")
    return code


def _contiguous(tensor: Tensor) -> Tensor:
    if not tensor.is_cpu:
        raise ValueError(f"the CPU kernels take CPU tensors, found one on {tensor.device}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _address(tensor: Tensor, dtype: torch.dtype, count: int, what: str) -> int:
    """The address of a tensor that has exactly the form a kernel reads."""
    if tensor.dtype is dtype and tensor.numel() == count and tensor.is_contiguous() and tensor.is_cpu:
        return tensor.data_ptr()
    raise ValueError(
        f"{what} must be {count} contiguous {dtype} on the CPU, found {tuple(tensor.shape)} of {tensor.dtype}"
        f"{'' if tensor.is_contiguous() else ', not contiguous'} on {tensor.device}"
    )


def _scale_address(scale: Tensor | None, what: str) -> int:
    return 0 if scale is None else _address(scale, torch.float32, 1, what)


def _output_scales(scale: Tensor | None, n: int) -> int:
    """How many output scales there are: none, one, or one for each of `n` channels."""
    return 0 if scale is None else n if scale.dim() and scale.numel() == n else 1


def _weight_address(weight: Tensor, in_features: int, num_bits: int) -> int:
    return _address(weight, torch.uint8, weight.shape[0] * ((in_features * num_bits + 7) // 8), "weight rows")


def peak_dots(num_bits: int, repeats: int, *, isa: str) -> int:
    """Do dots of operands that stay in the first-level cache; how many multiply-adds that was."""
    return _native.peak_dots(isa_code(isa), num_bits, repeats, torch.get_num_threads())


def read_all(tensor: Tensor, *, isa: str) -> None:
    """Read every byte of a contiguous tensor whose size is a multiple of 8 bytes."""
    address = _address(tensor, tensor.dtype, tensor.numel(), "tensor")
    _native.read_all(isa_code(isa), address, tensor.nbytes, torch.get_num_threads())


def quantize(x: Tensor, scale: Tensor, *, isa: str) -> Tensor:
    """See `numerics.quantize`."""
    dtype = dtype_code(x.dtype)
    x = _contiguous(x)
    q = torch.empty(x.shape, dtype=torch.int8)
    scale_address = _scale_address(scale, "scale")
    _native.quantize(
        isa_code(isa), x.data_ptr(), dtype, x.numel(), scale_address, q.data_ptr(), torch.get_num_threads()
    )
    return q


def accumulate(q: Tensor, weight: Tensor, num_bits: int, group_size: int = 0, *, isa: str, path: str) -> Tensor:
    """See `numerics.accumulate`; `weight` are canonical rows."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"q must be int8 [M, in], found {tuple(q.shape)} of {q.dtype}")
    q = _contiguous(q)
    (m, k), n = q.shape, weight.shape[0]
    weight_address = _weight_address(weight, k, num_bits)
    acc = torch.empty((m, n, k // group_size if group_size > 0 else 1), dtype=torch.int32)
    _native.accumulate(
        isa_code(isa),
        path_code(path),
        q.data_ptr(),
        weight_address,
        acc.data_ptr(),
        m,
        n,
        k,
        num_bits,
        group_size,
        torch.get_num_threads(),
    )
    return acc


def requantize(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    isa: str,
) -> Tensor:
    """See `numerics.requantize`."""
    if acc.dtype != torch.int32 or acc.dim() != 3:
        raise ValueError(f"acc must be int32 [M, out, groups], found {tuple(acc.shape)} of {acc.dtype}")
    acc = _contiguous(acc)
    m, n, groups = acc.shape
    outputs = _output_scales(output_scale, n)
    y = torch.empty((m, n), dtype=dtype)
    _native.requantize(
        isa_code(isa),
        acc.data_ptr(),
        _address(weight_scale, torch.float32, n * groups, "weight_scale"),
        _scale_address(input_scale, "input_scale"),
        0 if output_scale is None else _address(output_scale, torch.float32, outputs, "output_scale"),
        outputs,
        0 if bias is None else _address(bias, torch.float32, n, "bias"),
        y.data_ptr(),
        dtype_code(dtype),
        m,
        n,
        groups,
        torch.get_num_threads(),
    )
    return y


def group_scales(weight_scale: Tensor, input_scale: Tensor, output_scale: Tensor | None, *, isa: str) -> Tensor:
    """What a layer with several groups multiplies its accumulators by, `r[n,g]`, in the order the kernels read it.

    Depends on the scales alone; `linear` makes it in every call that is not given it.

    Args:
        weight_scale: float32 `[out, groups]`.
        input_scale: float32, one element.
        output_scale: float32, one element or `[out]`, or None.
        isa: as everywhere here.

    Returns:
        float32 `[ceil(out / 4), groups, 4]`, 0 past the last channel: as many bytes as `weight_scale` has.
    """
    n, groups = weight_scale.shape
    outputs = _output_scales(output_scale, n)
    r = streamed_empty(((n + 3) // 4, groups, 4), torch.float32)
    _native.group_scales(
        isa_code(isa),
        _address(weight_scale, torch.float32, n * groups, "weight_scale"),
        _scale_address(input_scale, "input_scale"),
        0 if output_scale is None else _address(output_scale, torch.float32, outputs, "output_scale"),
        outputs,
        r.data_ptr(),
        n,
        groups,
        torch.get_num_threads(),
    )
    return r


def _versions(*scales: Tensor | None) -> tuple[int, ...]:
    """Counts of the changes made in place; torch counts none for a tensor made in inference mode."""
    return tuple(s._version for s in scales if s is not None and not s.is_inference())


class BoundLinear:
    """`linear` with everything but the activations checked once, which costs more than a small layer takes.

    A call allocates the output and little else. The bound tensors are held, so their memory stays; whether they are
    still what a caller means, and where they were, `holds` says.

    A layer with several groups keeps its `group_scales`: 4 bytes a group beside the weight scales. Scales made in
    inference mode may change unseen, so there every call computes them.

    Attributes:
        dtype: of the activations it takes.
    """

    __slots__ = ("_addresses", "_in_features", "_kept", "_made_of", "_out_features", "_run", "_tensors", "dtype")

    def __init__(
        self,
        dtype: torch.dtype,
        in_features: int,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        output_scale: Tensor | None,
        bias: Tensor | None,
        num_bits: int,
        group_size: int = 0,
        *,
        isa: str,
        path: str,
        keep: bool = True,
    ) -> None:
        """Check the tensors.

        Args:
            dtype: of the activations.
            in_features: K.
            weight: canonical rows; this and what follows as for `linear`.
            weight_scale: see there.
            input_scale: see there.
            output_scale: see there.
            bias: see there.
            num_bits: see there.
            group_size: see there.
            isa: see there.
            path: see there.
            keep: keep what can be computed once; for a single call it is not worth it.

        Raises:
            ValueError: one does not fit.
        """
        n = weight.shape[0]
        groups = in_features // group_size if group_size > 0 else 1
        outputs = _output_scales(output_scale, n)
        self._addresses = (
            _weight_address(weight, in_features, num_bits),
            _address(weight_scale, torch.float32, n * groups, "weight_scale"),
            _scale_address(input_scale, "input_scale"),
            0 if output_scale is None else _address(output_scale, torch.float32, outputs, "output_scale"),
            0 if bias is None else _address(bias, torch.float32, n, "bias"),
        )
        self._tensors = (weight, weight_scale, input_scale, output_scale, bias)
        self._in_features, self._out_features, self.dtype = in_features, n, dtype
        self._kept: Tensor | None = None
        self._made_of = _versions(weight_scale, input_scale, output_scale)
        if keep and groups > 1 and len(self._made_of) == 3 - (output_scale is None):
            self._kept = group_scales(weight_scale.view(n, groups), input_scale, output_scale, isa=isa)
        self._run = _native.BoundLinear(
            isa_code(isa),
            path_code(path),
            dtype_code(dtype),
            *self._addresses[:4],
            outputs,
            self._addresses[4],
            0 if self._kept is None else self._kept.data_ptr(),
            n,
            in_features,
            num_bits,
            group_size,
        ).run

    def holds(
        self,
        weight: Tensor | None,
        weight_scale: Tensor | None,
        input_scale: Tensor | None,
        output_scale: Tensor | None,
        bias: Tensor | None,
    ) -> bool:
        """Whether these are the bound tensors, and nothing that was taken from them has changed.

        `share_memory_` moves their memory; a change in place makes what was computed of the scales of groups untrue.
        """
        own, at = self._tensors, self._addresses
        return (
            weight is own[0]
            and weight_scale is own[1]
            and input_scale is own[2]
            and output_scale is own[3]
            and bias is own[4]
            and own[0].data_ptr() == at[0]
            and own[1].data_ptr() == at[1]
            and own[2].data_ptr() == at[2]
            and (output_scale is None or output_scale.data_ptr() == at[3])
            and (bias is None or bias.data_ptr() == at[4])
            and (self._kept is None or self._made_of == _versions(own[1], own[2], output_scale))
        )

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if x.dtype is not self.dtype or not x.is_cpu:
            raise ValueError(f"x must be {self.dtype} on the CPU, found {x.dtype} on {x.device}")
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The same for `x` that is known to be of the bound dtype and on the CPU."""
        shape = x.shape
        if shape[-1] != self._in_features:
            raise ValueError(f"x must be [..., {self._in_features}], found {tuple(shape)}")
        if not x.is_contiguous():
            x = x.contiguous()
        # sizes apart are half a microsecond faster than a tuple of them
        if len(shape) == 2:
            rows = shape[0]
            y = x.new_empty(rows, self._out_features)
        else:
            rows = math.prod(shape[:-1])
            y = x.new_empty(*shape[:-1], self._out_features)
        self._run(x.data_ptr(), y.data_ptr(), rows, torch.get_num_threads())
        return y


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    group_size: int = 0,
    *,
    isa: str,
    path: str,
) -> Tensor:
    """See `numerics.linear_integer`; `weight` are canonical rows."""
    tensors = (weight, weight_scale, input_scale, output_scale, bias)
    return BoundLinear(x.dtype, x.shape[-1], *tensors, num_bits, group_size, isa=isa, path=path, keep=False)(x)


def linear_weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    output_scale: Tensor | None,
    bias: Tensor | None,
    num_bits: int,
    *,
    isa: str,
) -> Tensor:
    """See `numerics.linear_emulated` without an input scale; `weight` are canonical rows, `x` is not float32.

    The sums are float32 over products of two 16-bit floats, in an order that depends on K alone; at 2 bits with one
    scale per channel they are exact integers over `x` in 22-bit fixed point (csrc/cpu/weight_digits.hpp). Either way
    the result is the same bits for every thread count, M and instruction set; it may differ from torch's, whose order
    is its own, in the last place.
    """
    dtype = dtype_code(x.dtype)
    x = _contiguous(x)
    *batch, k = x.shape
    n, groups = weight_scale.shape
    y = torch.empty((*batch, n), dtype=x.dtype)
    _native.weight_only(
        isa_code(isa),
        x.data_ptr(),
        dtype,
        _address(weight, torch.uint8, n * ((k * num_bits + 7) // 8), "weight rows"),
        _address(weight_scale, torch.float32, n * groups, "weight_scale"),
        _scale_address(output_scale, "output_scale"),
        0 if bias is None else _address(bias, torch.float32, n, "bias"),
        y.data_ptr(),
        math.prod(batch),
        n,
        k,
        num_bits,
        groups,
        torch.get_num_threads(),
    )
    return y


def _row_stride(table: Tensor, dtype: torch.dtype, what: str) -> int:
    """Elements from one row to the next of a table whose rows are each contiguous, though the table need not be."""
    if table.dtype != dtype or table.dim() != 2 or not table.is_cpu or (table.shape[1] > 1 and table.stride(1) != 1):
        raise ValueError(
            f"{what} must be {dtype} [rows, ...] on the CPU with contiguous rows, found {tuple(table.shape)} of "
            f"{table.dtype} with strides {table.stride()} on {table.device}"
        )
    return table.stride(0)


def embedding(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    num_bits: int,
    embedding_dim: int,
    embed_scale: float,
    dtype: torch.dtype,
    *,
    isa: str,
) -> Tensor:
    """See `numerics.embedding`; `weight` are the canonical rows of the whole table, of which only `ids` are read.

    The rows may lie apart (a table cut out of a wider one). An id that is not a row raises IndexError.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be int64 or int32, found {ids.dtype}")
    ids = _contiguous(ids)
    rows, groups = weight_scale.shape
    if weight.shape != (rows, (embedding_dim * num_bits + 7) // 8):
        raise ValueError(
            f"{rows} rows of {embedding_dim} codes of {num_bits} bits need uint8 rows of "
            f"{(embedding_dim * num_bits + 7) // 8} bytes, found {tuple(weight.shape)}"
        )
    y = torch.empty((*ids.shape, embedding_dim), dtype=dtype)
    _native.embedding(
        isa_code(isa),
        ids.data_ptr(),
        ids.dtype == torch.int64,
        ids.numel(),
        weight.data_ptr(),
        _row_stride(weight, torch.uint8, "weight rows"),
        weight_scale.data_ptr(),
        _row_stride(weight_scale, torch.float32, "weight_scale"),
        rows,
        embedding_dim,
        groups,
        num_bits,
        embed_scale,
        y.data_ptr(),
        dtype_code(dtype),
        torch.get_num_threads(),
    )
    return y
