"""Other readers take what bytelane writes, and bytelane takes what other writers write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from bytelane.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from bytelane.numerics import dequantize_weight
from bytelane.packing import unpack_rows
from checkpoints import COMPRESSED, GEMMA, HandMade, hand_made, llama_config, skeleton_of
from test_checkpoint_write import contents

DENSE = pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), 3).shape[1] == 3
"""Whether the installed package packs widths that do not divide 32 densely."""


def load_with_transformers(directory: Path, left_out: frozenset[str] = frozenset()) -> PreTrainedModel:
    """The model as transformers loads it, every tensor of the file taken but those `left_out`, and none missing."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"], info
    assert info["unexpected_keys"] == left_out, info
    assert not info["mismatched_keys"], info
    return model


def kv_scales_without_a_place(directory: Path, made: HandMade) -> frozenset[str]:
    """The KV-cache scales of a file that the compressed-tensors package makes no parameter for.

    It knows attention modules by the name of a parameter of their `forward`. transformers 5.24 renamed that parameter,
    and compressed-tensors 0.20 finds none there: the scales are then left over, as transformers' own report says.
    """
    raw = json.loads((directory / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_config(made.model)
    apply_quantization_config(model, QuantizationConfig.model_validate(raw))
    scales = {name for name in load_file(directory / "model.safetensors") if name.endswith((".k_scale", ".v_scale"))}
    return frozenset(scales - dict(model.named_parameters()).keys())


def dense(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The weight as codes times scales."""
    module, tensors = checkpoint.modules[name], checkpoint.read(name)
    codes = unpack_rows(tensors.rows, module.scheme.weight.num_bits, module.shape[1])
    return dequantize_weight(codes, tensors.weight_scale, torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 8, "fmt": "int-quantized"},
        {"bits": 4, "kv": True},
        {"bits": 4, "group": 32, "sides": (False, True)},
        {"bits": 2, "sides": (False, False)},
        {"bits": 4, "head": True},
        pytest.param({"bits": 3}, marks=pytest.mark.skipif(not DENSE, reason="this release packs 3 bits otherwise")),
        pytest.param({"bits": 5}, marks=pytest.mark.skipif(not DENSE, reason="this release packs 5 bits otherwise")),
    ],
    ids=str,
)
def test_transformers_and_compressed_tensors_load_what_we_write(options: dict[str, Any], tmp_path: Path) -> None:
    made = hand_made(**options)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    write_checkpoint(tmp_path / "b", storage=COMPRESSED, **contents(source))
    written = load_file(tmp_path / "b" / "model.safetensors")
    left_out = kv_scales_without_a_place(tmp_path / "b", made)
    model = load_with_transformers(tmp_path / "b", left_out)
    for name in {n for n in written if n.endswith((".k_scale", ".v_scale"))} - left_out:
        assert torch.equal(model.get_parameter(name), written[name]), name
    ModelCompressor(quantization_config=model.config.quantization_config.quantization_config).decompress_model(model)
    for name, module in source.modules.items():
        loaded = model.get_submodule(name)
        assert torch.equal(loaded.weight, dense(source, name)), name
        for side in ("input_scale", "output_scale"):
            value = getattr(source.read(name), side)
            assert (getattr(loaded, side, None) is not None) == (value is not None)
            assert value is None or torch.equal(getattr(loaded, side).reshape(()), value)
        if f"{name}.weight_packed" in written:
            bits = module.scheme.weight.num_bits
            codes = unpack_from_int32(written[f"{name}.weight_packed"], bits, torch.Size(module.shape))
            assert torch.equal(codes, made.codes[name])
    for name in source.plain:
        assert torch.equal(model.state_dict()[name], source.read_plain(name))


def test_compressed_tensors_takes_the_tables_we_write(tmp_path: Path) -> None:
    """Packed embedding tables, which the package decompresses (transformers itself loads none)."""
    made = hand_made(bits=4, embeddings=True)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    write_checkpoint(tmp_path / "b", storage=COMPRESSED, **contents(source))
    written = load_file(tmp_path / "b" / "model.safetensors")
    raw = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    model = AutoModelForCausalLM.from_config(made.model)
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.load_state_dict(written, strict=True)
    compressor.decompress_model(model)
    for name in source.modules:
        assert torch.equal(model.get_submodule(name).weight, dense(source, name)), name


@pytest.mark.parametrize(
    "options",
    [{"bits": 2}, {"bits": 4, "kv": True}, {"bits": 8}, {"bits": 4, "embeddings": True, "head": True}],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_transformers_loads_the_gemma_files_we_write(options: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    made = hand_made(**options, attention_bias=bias)
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    write_checkpoint(tmp_path / "b", storage=GEMMA, **contents(source))
    model = load_with_transformers(tmp_path / "b")
    kinds = {n for n, m in model.named_modules() if type(m).__name__ in ("QuantizedLinear", "QuantizedEmbedding")}
    assert kinds == set(source.modules)
    for name, module in source.modules.items():
        loaded = model.get_submodule(name)
        assert loaded.num_bits == module.scheme.weight.num_bits
        weight = loaded.weight if name == "model.embed_tokens" else loaded._dequantize_weights()
        assert torch.equal(weight, dense(source, name)), name
    for name in source.plain:
        assert torch.equal(model.state_dict()[name], source.read_plain(name))
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_mixed_widths_load_in_transformers(tmp_path: Path) -> None:
    """Layers of several widths: the patterns mean the same to transformers."""
    made, two = hand_made(GEMMA, 4), hand_made(GEMMA, 2)
    made.quantization["module_quant_configs"] = {r"layers\.1\.mlp\.": {"num_bits": 2}}
    for name in [n for n in made.codes if "layers.1.mlp" in n]:
        made.tensors[f"{name}.weight"] = two.tensors[f"{name}.weight"]
    source = open_checkpoint(made.write(tmp_path / "a"), skeleton_of(made.model))
    write_checkpoint(tmp_path / "gemma", storage=GEMMA, **contents(source))
    write_checkpoint(tmp_path / "ct", storage=COMPRESSED, **contents(source))
    model = load_with_transformers(tmp_path / "gemma")
    for name, module in source.modules.items():
        assert model.get_submodule(name).num_bits == module.scheme.weight.num_bits
    model = load_with_transformers(tmp_path / "ct")
    for name, module in source.modules.items():
        assert model.get_submodule(name).quantization_scheme.weights.num_bits == module.scheme.weight.num_bits


@pytest.mark.parametrize("fmt", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_files_that_compressed_tensors_wrote(bits: int, group: int | None, fmt: str, tmp_path: Path) -> None:
    """A model quantized, compressed and configured by the package itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config())
    int8 = {"num_bits": 8, "strategy": "tensor"}
    weights: dict[str, Any] = {"num_bits": bits, "strategy": "channel"}
    if group is not None:
        weights = {"num_bits": bits, "strategy": "group", "group_size": group}
    config = QuantizationConfig(
        config_groups={
            "linears": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": int8,
                "output_activations": int8,
                "format": fmt,
            }
        },
        ignore=["lm_head"],
        format=fmt,
    )
    apply_quantization_config(model, config)
    high = (1 << (bits - 1)) - 1
    original = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            blocks = module.weight.detach().unflatten(1, (module.weight_scale.shape[1], -1))
            module.weight_scale.data = blocks.abs().amax(-1) / (high + 0.5)
            module.input_scale.data.fill_(0.05)
            module.output_scale.data.fill_(0.07)
            codes = torch.clamp(torch.round(blocks / module.weight_scale.data[..., None]), -high - 1, high)
            original[name] = codes.flatten(1).to(torch.int8)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    checkpoint = open_checkpoint(tmp_path, skeleton_of(llama_config()))
    assert set(checkpoint.modules) == set(original)
    for name, codes in original.items():
        tensors = checkpoint.read(name)
        assert torch.equal(unpack_rows(tensors.rows, bits, codes.shape[1]), codes)
        assert float(tensors.input_scale) == float(torch.tensor(0.05))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
