"""Tiny random models of each supported architecture, written as wNa8o8 checkpoints with random codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from bytelane.checkpoint import KVScales, QuantizedModule, QuantizedTensors, write_checkpoint
from bytelane.packing import pack_rows
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme, code_range

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}


def config(architecture: str, **changes: object) -> PretrainedConfig:
    """A tiny configuration of llama, gemma3, gemma4 or qwen3."""
    sizes = {**SIZES, **changes}
    if architecture == "llama":
        return LlamaConfig(tie_word_embeddings=False, **sizes)
    if architecture == "qwen3":
        return Qwen3Config(**{"tie_word_embeddings": False, **sizes})
    if architecture == "gemma3":
        return Gemma3TextConfig(sliding_window=16, layer_types=["sliding_attention", "full_attention"], **sizes)
    if architecture == "gemma4":
        sizes.update(num_hidden_layers=3, num_key_value_heads=1)
        layers = ["sliding_attention", "full_attention", "full_attention"]
        return Gemma4TextConfig(
            sliding_window=16,
            layer_types=layers,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=1,
            tie_word_embeddings=False,
            **sizes,
        )
    raise ValueError(architecture)


def float_model(model_config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """The float model of a configuration, with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).eval()


def random_tensors(
    seed: int, shape: tuple[int, int], scheme: LinearScheme | EmbeddingScheme, bias: Tensor | None
) -> tuple[Tensor, QuantizedTensors]:
    """Random codes and scales of a plausible size; also the codes, for oracles."""
    generator = torch.Generator().manual_seed(seed)
    bits, groups = scheme.weight.num_bits, scheme.weight.groups(shape[1])
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)
    scale = (0.5 + torch.rand(shape[0], groups, generator=generator)) * (0.12 / (1 << (bits - 1)))
    linear = isinstance(scheme, LinearScheme)
    return codes, QuantizedTensors(
        rows=pack_rows(codes, bits),
        weight_scale=scale,
        input_scale=torch.tensor(0.031) if linear and scheme.quantize_input else None,
        output_scale=torch.tensor(0.027) if linear and scheme.quantize_output else None,
        bias=bias,
    )


def write_random(
    directory: Path,
    model_config: PretrainedConfig,
    schemes: Mapping[str, LinearScheme | EmbeddingScheme],
    *,
    storage: str = "compressed-tensors",
    kv_scales: Mapping[str, KVScales] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Write a checkpoint in which the named modules are quantized with random codes; returns the codes by name."""
    model = float_model(model_config, seed)
    all_codes: dict[str, Tensor] = {}
    modules: list[tuple[QuantizedModule, QuantizedTensors]] = []
    for index, (name, scheme) in enumerate(schemes.items()):
        module = model.get_submodule(name)
        linear = isinstance(scheme, LinearScheme)
        bias = module.bias if linear else None
        shape = tuple(module.weight.shape)
        all_codes[name], tensors = random_tensors(index, shape, scheme, None if bias is None else bias.detach())
        lies = Storage.INT_QUANTIZED if scheme.weight.num_bits == 8 and linear else Storage.PACK_QUANTIZED
        if storage == "gemma":
            lies = Storage.GEMMA
        kind = Kind.LINEAR if linear else Kind.EMBEDDING
        modules.append((QuantizedModule(name, kind, shape, scheme, lies, bias is not None), tensors))

    def plain() -> Iterator[tuple[str, Tensor]]:
        tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
        for key, tensor in model.state_dict().items():
            if key.rpartition(".")[0] not in schemes and key not in tied:
                yield key, tensor

    candidates = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    raw = model_config.to_dict()
    raw["architectures"] = [type(model).__name__]
    write_checkpoint(
        directory,
        config=raw,
        storage=storage,
        modules=modules,
        plain=plain(),
        kv_scales=kv_scales or {},
        unquantized=[n for n in candidates if n not in schemes],
    )
    return all_codes


def linear_names(model_config: PretrainedConfig) -> list[str]:
    """Names of every linear layer of a configuration's model."""
    return [n for n, m in float_model(model_config).named_modules() if isinstance(m, nn.Linear)]


def default_schemes(model_config: PretrainedConfig, *, head: bool = True) -> dict[str, LinearScheme | EmbeddingScheme]:
    """A mixed plan: attention 4 bits, MLP 2, 3 and 8 bits, the head 8 bits weight-only, embeddings 4 bits."""
    plan: dict[str, LinearScheme | EmbeddingScheme] = {}
    for name in linear_names(model_config):
        bits = {"gate_proj": 2, "up_proj": 3, "down_proj": 8}.get(name.rpartition(".")[2], 4)
        if name != "lm_head":
            plan[name] = LinearScheme(WeightScheme(bits))
        elif head:
            plan[name] = LinearScheme(WeightScheme(8), quantize_input=False, quantize_output=False)
    plan["model.embed_tokens"] = EmbeddingScheme(WeightScheme(4))
    return plan
