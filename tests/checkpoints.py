"""Hand-made checkpoints of a tiny Llama, for tests: plain dictionaries, written by nothing of the package's own.

`hand_made` gives the configuration and the tensors of a valid checkpoint together with the codes behind them. A test
breaks one thing and writes the files; packing is done with Python integers, so it is independent of what it tests.
"""

from __future__ import annotations

import copy
import functools
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

COMPRESSED, GEMMA = "compressed-tensors", "gemma"


def llama_config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(values | changes))


def skeleton_of(config: LlamaConfig) -> PreTrainedModel:
    """The model without weights; one for all tests, since nothing changes it."""
    return _skeleton(config.to_json_string(use_diff=False))


@functools.cache
def _skeleton(config_json: str) -> PreTrainedModel:
    config = LlamaConfig(**json.loads(config_json))
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config)


def pack_bits(codes: torch.Tensor, bits: int, row_bytes: int) -> torch.Tensor:
    """Rows of signed codes as a little-endian bit stream with an offset of 2^(N-1), zero-filled to `row_bytes`."""
    rows = []
    for row in codes.tolist():
        stream = sum((code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(row))
        rows.append(list(stream.to_bytes(row_bytes, "little")))
    return torch.tensor(rows, dtype=torch.uint8)


def random_codes(shape: tuple[int, int], bits: int, generator: torch.Generator) -> torch.Tensor:
    low = -(1 << (bits - 1))
    return torch.randint(low, -low, shape, dtype=torch.int8, generator=generator)


def words(columns: int, bits: int, *, padded: bool) -> int:
    return -(-columns // 32) * bits if padded else -(-columns * bits // 32)


def scheme_dict(bits: int, group: int | None = None, *, sides: tuple[bool, bool] = (True, True)) -> dict[str, Any]:
    """A config group as it stands in config.json, without targets."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if group is None else "group",
            "group_size": group,
            "dynamic": False,
        },
        "input_activations": dict(int8) if sides[0] else None,
        "output_activations": dict(int8) if sides[1] else None,
    }


@dataclass
class HandMade:
    """A checkpoint in memory; `write` makes the folder."""

    model: LlamaConfig
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    codes: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def group(self) -> dict[str, Any]:
        return self.quantization["config_groups"]["group_0"]

    def write(self, directory: Path, *, shards: list[list[str]] | None = None) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        if shards is None:
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
            return directory
        weight_map = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file({n: tensors[n] for n in names}, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory


def hand_made(*arguments: Any, **options: Any) -> HandMade:
    """A valid checkpoint, free to be changed: see `_make`."""
    key = tuple(sorted(options.items(), key=lambda item: item[0]))
    return copy.deepcopy(_cached(arguments, key))


@functools.cache
def _cached(arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> HandMade:
    return _make(*arguments, **dict(options))


def _make(
    storage: str = COMPRESSED,
    bits: int = 4,
    *,
    group: int | None = None,
    sides: tuple[bool, bool] = (True, True),
    fmt: str = "pack-quantized",
    padded: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    embeddings: bool = False,
    head: bool = False,
    kv: bool = False,
    seed: int = 0,
    **changes: Any,
) -> HandMade:
    """A valid checkpoint: all linears of the layers quantized, embeddings and head when asked."""
    generator = torch.Generator().manual_seed(seed)
    model = llama_config(**changes)
    skeleton = skeleton_of(model)
    config = json.loads(model.to_json_string(use_diff=False))
    made = HandMade(model, config, {})
    for name, parameter in skeleton.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = skeleton.get_submodule(owner)
        linear, table = isinstance(module, torch.nn.Linear), isinstance(module, torch.nn.Embedding)
        quantized = (linear and (head or owner != "lm_head")) or (table and embeddings)
        if model.tie_word_embeddings and owner == "lm_head":
            continue
        if not quantized or leaf == "bias":
            made.tensors[name] = torch.randn(parameter.shape, generator=generator)
            continue
        shape = (parameter.shape[0], parameter.shape[1])
        codes = random_codes(shape, bits, generator)
        made.codes[owner] = codes
        groups = 1 if group is None else shape[1] // group
        scale = (torch.rand(shape[0], groups, generator=generator) / 64 + 1e-3).to(scale_dtype)
        if storage == GEMMA:
            rows = codes if bits == 8 else pack_bits(codes, bits, -(-shape[1] * bits // 8))
            made.tensors[f"{owner}.{'embedding_quantized' if table else 'weight'}"] = rows
            made.tensors[f"{owner}.{'embedding_scale' if table else 'weight_scale'}"] = scale
        elif fmt == "pack-quantized":
            packed = pack_bits(codes, bits, 4 * words(shape[1], bits, padded=padded)).view(torch.int32)
            made.tensors[f"{owner}.weight_packed"] = packed
            made.tensors[f"{owner}.weight_shape"] = torch.tensor(shape)
            made.tensors[f"{owner}.weight_scale"] = scale
        else:
            made.tensors[f"{owner}.weight"] = codes
            made.tensors[f"{owner}.weight_scale"] = scale
        if linear:
            for side, wanted in zip(("input", "output"), sides, strict=True):
                value = torch.rand((), generator=generator) / 8 + 0.01
                if storage == GEMMA:
                    made.tensors[f"{owner}.{side}_activation_scale"] = value if wanted else torch.tensor(0.0)
                elif wanted:
                    made.tensors[f"{owner}.{side}_scale"] = value.reshape(1)
    leaves = ("k_cache_scale", "v_cache_scale") if storage == GEMMA else ("k_scale", "v_scale")
    for layer in range(model.num_hidden_layers if kv else 0):
        for leaf in leaves:
            made.tensors[f"model.layers.{layer}.self_attn.{leaf}"] = torch.rand(1, generator=generator) + 0.01
    left = [] if head else ["lm_head"]
    if storage == GEMMA:
        config["quantization_config"] = {
            "quant_method": GEMMA,
            "num_bits": bits,
            "quantize_embeddings": embeddings,
            "module_quant_configs": {},
            "modules_to_not_convert": left,
        }
        return made
    groups_dict = {"group_0": {"targets": ["Linear"], **scheme_dict(bits, group, sides=sides)}}
    if embeddings:
        groups_dict["group_1"] = {
            "targets": ["model.embed_tokens"],
            **scheme_dict(bits, group, sides=(False, False)),
        }
    config["quantization_config"] = {
        "quant_method": COMPRESSED,
        "config_groups": groups_dict,
        "format": fmt,
        "quantization_status": "compressed",
        "ignore": left,
    }
    if kv:
        config["quantization_config"]["kv_cache_scheme"] = scheme_dict(8)["input_activations"]
    return made


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file from its parts, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data
