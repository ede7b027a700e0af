"""The linear method: vLLM's merged and split layers, their tensors taken from its stream, their arithmetic in `runs`.

A layer has one part for each checkpoint module merged into it. What a row-parallel layer over several ranks returns is
final, summed and requantized once, so the layer is told not to reduce again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearMethodBase, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from bytelane.checkpoint.layout import ModuleLayout
from bytelane.errors import ShardingError, UnsupportedFormatError
from bytelane.integrations.vllm.parts import Part, Span
from bytelane.integrations.vllm.runs import Run, install_runs, run_parts, run_reduced
from bytelane.integrations.vllm.table import ModuleTable

EXACT_BIAS = "exact_bias"
"""The name under which a bias is loaded in the dtype it is stored in; vLLM's own `bias` has the model's dtype."""

_SHARDS = {"q": 0, "k": 1, "v": 2}

_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


class PartLoader:
    """The `weight_loader` of one kind of tensor: hands it to the part it belongs to."""

    def __init__(self, parts: Sequence[Part], role: str) -> None:
        self.parts = parts
        self.role = role

    def __call__(
        self, parameter: nn.Parameter, loaded: Tensor, shard: str | int | tuple[int, ...] | None = None
    ) -> None:
        """Called by vLLM with a whole stored tensor and, in merged layers, with the part's name or number."""
        index = _SHARDS.get(shard, 0) if isinstance(shard, str) else 0 if shard is None else shard
        if not isinstance(index, int) or (shard is None and len(self.parts) > 1):
            layout = self.parts[0].layout
            raise UnsupportedFormatError(
                "several projections stored as one tensor are not of this scheme: each has its own scales",
                file=self.parts[0].source,
                tensor=layout.name,
            )
        self.parts[index].take(self.role, loaded)


def add_placeholders(layer: nn.Module, parts: Sequence[Part], table: ModuleTable, *, bias: bool) -> None:
    """Empty parameters under the stored tensors' names, for vLLM to find; the parts take what is loaded."""
    leaves: dict[str, tuple[str, str]] = {}
    for part in parts:
        for role, leaf in part.leaves.items():
            leaves.setdefault(leaf, (role, f"{part.layout.name}.{leaf}"))
    if bias:
        leaves[EXACT_BIAS] = ("bias", f"{parts[0].layout.name}.bias")
    for leaf, (role, tensor) in leaves.items():
        header = table.headers.get(tensor)
        dtype = _STORED_DTYPES.get(header.dtype if header else "", torch.float32)
        dtype = {"I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}.get(header.dtype if header else "", dtype)
        placeholder = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        set_weight_attrs(placeholder, {"weight_loader": PartLoader(parts, role)})
        layer.register_parameter(leaf, placeholder)


def drop_placeholders(layer: nn.Module, parts: Sequence[Part]) -> torch.device:
    """Remove them again; returns the device they were on, which is the layer's."""
    names = {leaf for part in parts for leaf in part.leaves.values()} | {EXACT_BIAS}
    device = torch.device("cpu")
    for name in names & set(layer._parameters):
        placeholder = layer._parameters.pop(name)
        device = device if placeholder is None else placeholder.device
    return device


def _output_spans(layer: Any, sizes: Sequence[int], wholes: Sequence[int], names: Sequence[str]) -> list[Span]:
    """This rank's rows of each part."""
    if isinstance(layer, VocabParallelEmbedding):
        found = layer.shard_indices
        start = found.org_vocab_start_index
        return [Span(start, found.org_vocab_end_index - start, layer.org_vocab_size)]
    return [
        Span.shard(size, whole, layer.tp_rank, layer.tp_size, name)
        for size, whole, name in zip(sizes, wholes, names, strict=True)
    ]


def make_parts(
    layer: Any,
    layouts: Sequence[ModuleLayout],
    table: ModuleTable,
    sizes: Sequence[int],
    inputs_here: int,
    inputs: int,
) -> list[Part]:
    """The parts of a layer as this rank holds them; `sizes` are the layer's own, of its padded outputs."""
    names = [layout.name for layout in layouts]
    if len(sizes) != len(layouts):
        raise UnsupportedFormatError(
            f"vLLM merges {len(sizes)} projections here, the checkpoint has {len(layouts)}",
            file=table.source,
            tensor=", ".join(names),
        )
    spans = _output_spans(layer, sizes, [layout.shape[0] for layout in layouts], names)
    columns = Span.shard(inputs_here, inputs, layer.tp_rank, layer.tp_size, names[0])
    vocabulary = isinstance(layer, VocabParallelEmbedding)
    return [
        Part(layout, span, columns, table.source, padded=size if vocabulary else None)
        for layout, span, size in zip(layouts, spans, sizes, strict=True)
    ]


class BytelaneLinearMethod(LinearMethodBase):
    """Runs one linear layer (or output head) of vLLM's from the checkpoint modules merged into it.

    Args:
        layouts: how each of them is stored, in the layer's order.
        table: the checkpoint's.
    """

    def __init__(self, layouts: Sequence[ModuleLayout], table: ModuleTable) -> None:
        self.layouts = tuple(layouts)
        self.table = table
        self.parts: list[Part] = []
        self.runs: tuple[Run, ...] = ()
        self.reduces = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Place the parameters that vLLM loads into.

        Raises:
            ShardingError: the layer cannot be split as asked.
            UnsupportedFormatError: the layer is used in a way this scheme has no meaning for.
        """
        name = self.layouts[0].name
        self.reduces = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        if self.reduces and not layer.reduce_results:
            raise ShardingError(
                "vLLM sums this layer's partial outputs later, after they would have been rounded to int8",
                file=self.table.source,
                tensor=name,
            )
        if layer.has_bias and getattr(layer, "skip_bias_add", False):
            raise UnsupportedFormatError(
                "vLLM adds this layer's bias later, after the output has been rounded to int8",
                file=self.table.source,
                tensor=name,
            )
        self.parts = make_parts(
            layer, self.layouts, self.table, output_partition_sizes, input_size_per_partition, input_size
        )
        add_placeholders(layer, self.parts, self.table, bias=layer.has_bias)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Seal the parts and join them; from here on the layer holds canonical packed rows and float32 scales.

        Raises:
            CheckpointError: the class that names the broken rule.
        """
        device = drop_placeholders(layer, self.parts)
        exact = any(part.has_bias for part in self.parts)
        biases: list[Tensor | None] = [None] * len(self.parts)
        if layer.bias is not None and not exact:  # loaded by a model class that does not follow the renaming
            biases = list(layer.bias.data.split([part.padded for part in self.parts]))
        sealed = [part.seal(bias) for part, bias in zip(self.parts, biases, strict=True)]
        self.runs = install_runs(
            layer, list(zip(self.layouts, sealed, strict=True)), self.parts[0].inputs.whole, device
        )
        self.parts = []
        if self.reduces:
            layer.reduce_results = False
        if isinstance(layer, ReplicatedLinear):
            # transformers' vision tower, which vLLM keeps, casts pixels to a weight's dtype where that is a float
            layer.weight = self.runs[0].tensors(layer)[0]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`; the bias is the layer's own, whatever vLLM hands over."""
        if self.reduces:
            return run_reduced(layer, self.runs[0], x, tensor_model_parallel_all_reduce)
        return run_parts(layer, self.runs, x)
