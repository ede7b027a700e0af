"""Quantized embedding tables, and the heads that share their codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from bytelane.checkpoint.layout import ModuleLayout
from bytelane.errors import MissingTensorError
from bytelane.integrations.vllm.linear import add_placeholders, drop_placeholders, make_parts
from bytelane.integrations.vllm.parts import Part
from bytelane.integrations.vllm.runs import Run, install_runs, run_parts
from bytelane.integrations.vllm.table import ModuleTable


class BytelaneEmbeddingMethod(QuantizeMethodBase):
    """Gathers and dequantizes rows of a packed table, this rank's share of the vocabulary.

    As a head (vLLM's model classes put the table in the head's place where the two are tied) it is a weight-only linear
    on the same codes, as everywhere in bytelane.
    """

    def __init__(self, layout: ModuleLayout, table: ModuleTable) -> None:
        self.layout = layout
        self.table = table
        self.parts: list[Part] = []
        self.runs: tuple[Run, ...] = ()
        self.dtype = torch.float32

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Place the parameters that vLLM loads into."""
        self.dtype = params_dtype
        self.parts = make_parts(
            layer, [self.layout], self.table, output_partition_sizes, input_size_per_partition, input_size
        )
        add_placeholders(layer, self.parts, self.table, bias=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Seal the table.

        Raises:
            CheckpointError: the class that names the broken rule.
        """
        device = drop_placeholders(layer, self.parts)
        (part,) = self.parts
        self.runs = install_runs(layer, [(self.layout, part.seal())], part.inputs.whole, device)
        self.parts = []

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Ids of any shape to `[..., dim]`; architectures that scale their embeddings do it themselves."""
        (run,) = self.runs
        packed, scale, *_ = run.tensors(layer)
        return torch.ops.bytelane.embedding(  # type: ignore[no-any-return]
            ids, packed, scale, run.num_bits, run.in_features, 1.0, self.dtype
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The head: `[..., dim]` to the logits of this rank's vocabulary."""
        logits = run_parts(layer, self.runs, x)
        return logits if bias is None else logits + bias


class BytelaneTiedHeadMethod(QuantizeMethodBase):
    """A head without tensors of its own: gives its place to the quantized table it is tied to."""

    def __init__(self, table: ModuleTable, name: str) -> None:
        self.table = table
        self.name = name

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """There are none."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The table itself, which runs as a head too."""
        return embed_tokens

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Reached only by a head that was never tied.

        Raises:
            MissingTensorError: always.
        """
        raise MissingTensorError(
            "the checkpoint has no head, and the model does not tie it to its embedding",
            file=self.table.source,
            tensor=self.name,
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Never reached: the head is gone once it is tied.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the head gave its place to the embedding")
