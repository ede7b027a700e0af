"""What a checkpoint holds, independent of how a storage spells it.

A checkpoint is a folder: `config.json`, safetensors files, tokenizer files. Reading one gives a list of quantized
modules (described without reading a weight), the plain tensors beside them, and the KV-cache scales. Writing one takes
the same values back. Every storage reads into and writes from these types, which is what makes conversion exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, row_bytes


@dataclass(frozen=True)
class QuantizedModule:
    """One quantized module of a checkpoint, described by its configuration and tensor headers.

    Attributes:
        name: the module's name, `model.layers.0.mlp.up_proj`.
        kind: linear or embedding.
        shape: `(out_features, in_features)`, or `(num_embeddings, embedding_dim)`.
        scheme: a `LinearScheme` for a linear, an `EmbeddingScheme` for an embedding. For a linear, a side whose scale
            is absent or exactly 0 is not quantized.
        storage: how the codes lie in the file.
        bias: whether the module has a bias.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    scheme: LinearScheme | EmbeddingScheme
    storage: Storage
    bias: bool = False

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return self.scheme.weight.groups(self.shape[1])

    @property
    def weight_bytes(self) -> int:
        """Bytes of the canonical packed rows."""
        return self.shape[0] * row_bytes(self.shape[1], self.scheme.weight.num_bits)


@dataclass(frozen=True)
class QuantizedTensors:
    """The tensors of one quantized module, in canonical form.

    Attributes:
        rows: uint8 `[out, ceil(in * N / 8)]`, the canonical packed codes of `bytelane.packing`.
        weight_scale: `[out, groups]`, in the dtype the checkpoint stores (float32, bfloat16 or float16).
        input_scale: float32, shape `[]`, positive; None when the side is not quantized.
        output_scale: likewise.
        bias: float `[out]` or None.
    """

    rows: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class ModuleScales:
    """The scales of one quantized module, without its codes.

    Attributes:
        weight_scale: `[out, groups]`, in the dtype the checkpoint stores (float32, bfloat16 or float16).
        input_scale: float32, shape `[]`, positive; None when the side is not quantized.
        output_scale: likewise.
    """

    weight_scale: Tensor
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's header: what it is and where it lies, without its data.

    Attributes:
        name: the tensor's name.
        dtype: its safetensors name, `"F32"`, `"BF16"`, `"I8"`.
        shape: its shape.
        file: the file's name within the folder.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class KVScales:
    """Static int8 KV-cache scales of one attention module: float32 values, positive."""

    k: float
    v: float


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion kept and what the target storage could not hold.

    Attributes:
        modules: quantized modules written.
        tensors: plain tensors copied.
        kept: notes on what was kept, one sentence each.
        lost: notes on what the target cannot hold, one sentence each; empty for a lossless conversion.
    """

    modules: int
    tensors: int
    kept: tuple[str, ...] = field(default_factory=tuple)
    lost: tuple[str, ...] = field(default_factory=tuple)
