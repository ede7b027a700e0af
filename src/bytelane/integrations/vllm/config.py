"""The two configurations vLLM asks: which method runs which layer.

Both are module-level classes, because vLLM sends them to its worker processes.
"""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from bytelane.errors import ConfigError, FileFormatError, UnsupportedFormatError
from bytelane.integrations.vllm.embedding import BytelaneEmbeddingMethod, BytelaneTiedHeadMethod
from bytelane.integrations.vllm.linear import EXACT_BIAS, BytelaneLinearMethod
from bytelane.integrations.vllm.table import TEXT_ONLY, Header, ModuleTable, integer_groups, serves
from bytelane.scheme import Kind

_log = logging.getLogger("vllm.plugins.bytelane")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Serving:
    """What both configurations share: the checkpoint's table, and the methods it leads to."""

    packed_modules_mapping: dict[str, list[str]]
    _raw: dict[str, Any]
    _table: ModuleTable | None = None

    @property
    def table(self) -> ModuleTable:
        """The checkpoint's quantized modules; vLLM has named the checkpoint before it builds a layer."""
        if self._table is None:
            raise ConfigError(
                "vLLM has not said which checkpoint this configuration is of", tensor="quantization_config"
            )
        return self._table

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Float32 and both halves: the codes do not depend on it."""
        return list(_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Of the GPU."""
        return 75

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called with the checkpoint's place: read the headers of its files.

        Raises:
            FileFormatError: it has no safetensors files.
            UnsupportedFormatError: it has a tower that vLLM builds without places for codes.
            ConfigError: or the subclass that names the rule the configuration breaks.
        """
        self._check_tower(model_name, hf_config)
        table = ModuleTable(self._raw, model_name)
        found = get_safetensors_params_metadata(model_name, revision=revision)
        if not found:
            raise FileFormatError("no safetensors files that can be read", file=model_name)
        # Local files come with their "__metadata__", which has no dtype.
        tensors = {name: info for name, info in found.items() if "dtype" in info}
        table.read_headers({n: Header(str(info["dtype"]), tuple(info["shape"])) for n, info in tensors.items()})
        self._table = table

    def _check_tower(self, model_name: str, hf_config: Any) -> None:
        """Under compressed-tensors vLLM's Gemma 4 quantizes a tower of any size, else one of multiples of 64."""
        vision = getattr(hf_config, "vision_config", None)
        towers = "Gemma4ForConditionalGeneration" in (getattr(hf_config, "architectures", None) or ())
        if isinstance(self, CompressedTensorsConfig) or not towers or vision is None:
            return
        sizes = vision.hidden_size, vision.intermediate_size
        if any(size % 64 for size in sizes):
            raise UnsupportedFormatError(
                f"vLLM leaves a vision tower of {sizes[0]} and {sizes[1]} features unquantized in this storage; "
                f"convert the checkpoint to compressed-tensors, or serve its text alone: {TEXT_ONLY}",
                file=Path(model_name) / "config.json",
                tensor="vision_config",
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Called with the names a model class gives the checkpoint's modules."""
        self.table.rename(hf_to_vllm_mapper.map_name)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Load biases as they are stored, and leave Gemma's KV-cache scales out: vLLM's cache stays float."""
        biased = self.table.biases()
        renamed: dict[re.Pattern[str], str | None] = {re.compile(r"\.[kv]_cache_scale$"): None}
        if biased:
            names = "|".join(map(re.escape, biased))
            renamed[re.compile(rf"^({names})\.bias$")] = rf"\1.{EXACT_BIAS}"
        return WeightsMapper(orig_to_new_regex=renamed)

    def method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Bytelane's method for a layer; None for a layer that is not bytelane's."""
        if isinstance(layer, ParallelLMHead):
            return self._head(layer, prefix or "lm_head")
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding(layer, prefix)
        if isinstance(layer, LinearBase):
            return self._linear(layer, prefix)
        return None

    def _linear(self, layer: Any, prefix: str) -> BytelaneLinearMethod | None:
        names = [self.table.stored_name(name) or name for name in self._part_names(prefix)]
        layouts = [
            self.table.layout(
                name, Kind.LINEAR, (self.table.rows(name) or layer.output_size, layer.input_size), bias=layer.has_bias
            )
            for name in names
        ]
        found = [layout for layout in layouts if layout is not None]
        if not found:
            return None
        if len(found) < len(layouts):
            raise ConfigError(
                "vLLM merges these projections, and only some of them are quantized",
                file=self.table.source,
                tensor=", ".join(names),
            )
        return BytelaneLinearMethod(found, self.table)

    def _part_names(self, prefix: str) -> list[str]:
        """The checkpoint modules vLLM merges into a layer, or the layer's own name."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf)
        if not parts:
            return [prefix]
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _head(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        name = self.table.stored_name(prefix)
        if name is None:
            tied = self._embedding(layer, "")
            return None if tied is None else BytelaneTiedHeadMethod(self.table, prefix)
        shape = (layer.org_vocab_size, layer.embedding_dim)
        layout = self.table.layout(name, Kind.LINEAR, shape, bias=layer.has_bias)
        return None if layout is None else BytelaneLinearMethod([layout], self.table)

    def _embedding(self, layer: Any, prefix: str) -> BytelaneEmbeddingMethod | None:
        name = self.table.stored_name(prefix) or self.table.embedding_name(layer.org_vocab_size)
        if name is None:
            return None
        layout = self.table.layout(name, Kind.EMBEDDING, (layer.org_vocab_size, layer.embedding_dim))
        return None if layout is None else BytelaneEmbeddingMethod(layout, self.table)


class BytelaneCompressedConfig(_Serving, CompressedTensorsConfig):
    """compressed-tensors with wNa8o8 layers run by bytelane; other layers of such a checkpoint stay vLLM's."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedTensorsConfig:
        """This class for a wNa8o8 checkpoint, vLLM's own for any other."""
        if not serves(config):
            return CompressedTensorsConfig.from_config(config)
        raw = copy.deepcopy(config)
        if raw.get("kv_cache_scheme") is not None:
            _log.info("the checkpoint's int8 KV-cache scales are not used: vLLM keeps keys and values in float")
        # vLLM gets the groups that are its own; it knows fp8 caches only, and would read the cache's scheme as one.
        integer = integer_groups(raw)
        others = {name: group for name, group in config["config_groups"].items() if name not in integer}
        made: BytelaneCompressedConfig = super().from_config(
            {**config, "config_groups": others, "kv_cache_scheme": None}
        )
        made._raw = raw
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Both tables follow."""
        _Serving.apply_vllm_mapper(self, hf_to_vllm_mapper)
        CompressedTensorsConfig.apply_vllm_mapper(self, hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Bytelane's where the layer is of the scheme, else what vLLM has for it."""
        if isinstance(layer, Attention):
            return None  # the only cache scales this storage has are int8 ones
        return self.method(layer, prefix) or super().get_quant_method(layer, prefix)


class BytelaneGemmaConfig(_Serving, QuantizationConfig):
    """Gemma's mobile storage, which vLLM itself does not read."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__()
        self._raw = raw

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BytelaneGemmaConfig:
        """From the checkpoint's `quantization_config`."""
        return cls(copy.deepcopy(config))

    def get_name(self) -> str:
        """Its `quant_method`."""
        return "gemma"

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the configuration is in config.json."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Bytelane's where the checkpoint has codes of the layer, else a float layer."""
        found = self.method(layer, prefix)
        if found is None and isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return found
