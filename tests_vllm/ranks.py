"""vLLM's own layers outside an engine: one decoder layer's worth, loaded from a checkpoint, on one rank or two.

Every layer is vLLM's class with bytelane's quantization configuration, loaded tensor by tensor through the parameters'
own loaders, as vLLM's model loader does it. `check` holds each output against `bytelane.load_model` of the same
checkpoint, to the bit; with two ranks each rank is a process with its own share.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@contextmanager
def parallel(rank: int, world: int, port: int) -> Iterator[None]:
    """A tensor-parallel group of `world` processes on this machine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    os.environ["VLLM_DIST_IDENT"] = f"bytelane{port}"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(world)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def configuration(directory: Path) -> Any:
    """The quantization configuration of a checkpoint, as vLLM makes it."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    from bytelane.integrations.vllm import register

    register()
    raw = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = get_quantization_config(raw["quant_method"]).from_config(raw)
    config.maybe_update_config(str(directory))
    config.packed_modules_mapping = dict(PACKED)
    return config


class OneLayer(nn.Module):
    """The linear layers of decoder layer 0, the embedding and the head, named as in vLLM's Llama."""

    def __init__(self, model_config: dict[str, Any], quant_config: Any, dtype: torch.dtype, bias: bool) -> None:
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        super().__init__()
        hidden, inner, heads = (model_config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
        head_dim = model_config.get("head_dim") or hidden // heads
        kv_heads, vocabulary = model_config["num_key_value_heads"], model_config["vocab_size"]
        common = {"quant_config": quant_config, "params_dtype": dtype}
        layer = "model.layers.0"
        self.qkv_proj = QKVParallelLinear(
            hidden, head_dim, heads, kv_heads, bias=bias, prefix=f"{layer}.self_attn.qkv_proj", **common
        )
        self.o_proj = RowParallelLinear(
            heads * head_dim, hidden, bias=bias, prefix=f"{layer}.self_attn.o_proj", **common
        )
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, bias=False, prefix=f"{layer}.mlp.gate_up_proj", **common
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, prefix=f"{layer}.mlp.down_proj", **common)
        # As vLLM's Llama makes it: without a name.
        self.embed_tokens = VocabParallelEmbedding(vocabulary, hidden, **common)
        self.lm_head = ParallelLMHead(vocabulary, hidden, prefix="lm_head", **common)
        if model_config["tie_word_embeddings"]:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)

    def load(self, tensors: dict[str, Tensor], quant_config: Any) -> None:
        """What vLLM's loader does: rename, find the parameter, call its loader; then let the methods finish."""
        shards = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
        fused = {part: name for name, parts in PACKED.items() for part in parts}
        mapper = quant_config.get_checkpoint_weight_mapper()
        for stored, tensor in tensors.items():
            name = mapper.map_name(stored)
            if name is None or (".layers." in name and ".layers.0." not in name) or "norm" in name:
                continue
            module, _, leaf = name.rpartition(".")
            part = module.rpartition(".")[2]
            layer = getattr(self, fused.get(part, part))
            parameter = dict(layer.named_parameters(recurse=False)).get(leaf)
            assert parameter is not None, f"no place for {stored}"
            shard = (shards[part],) if part in shards else ()
            parameter.weight_loader(parameter, tensor, *shard)
        for layer in self.children():
            layer.quant_method.process_weights_after_loading(layer)


def build(directory: Path, dtype: torch.dtype, *, bias: bool = False) -> OneLayer:
    quant_config = configuration(directory)
    model_config = json.loads((directory / "config.json").read_text())
    made = OneLayer(model_config, quant_config, dtype, bias)
    made.load(load_file(directory / "model.safetensors"), quant_config)
    return made


def share(tensor: Tensor, rank: int, world: int) -> Tensor:
    return tensor.chunk(world, dim=-1)[rank].contiguous()


def outputs(made: OneLayer, directory: Path, dtype: torch.dtype, rank: int, world: int, rows: int) -> dict[str, tuple]:
    """For every layer, what vLLM gives on this rank and what `bytelane.load_model` gives there."""
    import bytelane

    reference = bytelane.load_model(directory, dtype=dtype)
    attention, mlp = reference.model.layers[0].self_attn, reference.model.layers[0].mlp
    generator = torch.Generator().manual_seed(7)

    def inputs(features: int) -> Tensor:
        return (torch.randn(rows, features, generator=generator) * 2).to(dtype)

    hidden, found = attention.q_proj.in_features, {}
    x = inputs(hidden)
    expected = [share(p(x), rank, world) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    found["qkv_proj"] = made.qkv_proj(x)[0], torch.cat(expected, -1)
    x = inputs(attention.o_proj.in_features)
    found["o_proj"] = made.o_proj(share(x, rank, world))[0], attention.o_proj(x)
    x = inputs(hidden)
    expected = [share(p(x), rank, world) for p in (mlp.gate_proj, mlp.up_proj)]
    found["gate_up_proj"] = made.gate_up_proj(x)[0], torch.cat(expected, -1)
    x = inputs(mlp.down_proj.in_features)
    found["down_proj"] = made.down_proj(share(x, rank, world))[0], mlp.down_proj(x)
    x, vocabulary = inputs(hidden), reference.config.vocab_size
    head = made.lm_head
    if type(reference.lm_head) is not nn.Linear:  # a float head is vLLM's own
        logits = head.quant_method.apply(head, x)
        indices = head.shard_indices
        start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
        found["lm_head"] = logits[:, : end - start], reference.lm_head(x)[:, start:end]
    ids = torch.randint(0, vocabulary, (rows,), generator=generator)
    found["embed_tokens"] = made.embed_tokens(ids), reference.model.embed_tokens(ids).to(dtype)
    return found


def check(
    directory: Path, dtype: torch.dtype, rank: int, world: int, *, bias: bool = False, exact: bool = True
) -> None:
    """Every output of this rank equals bytelane's own, to the bit; or nearly, where float sums cross ranks."""
    made = build(directory, dtype, bias=bias)
    for rows in (1, 5):
        for name, (actual, expected) in outputs(made, directory, dtype, rank, world, rows).items():
            assert actual.dtype == expected.dtype, name
            where = f"{directory.name} {name} rows {rows} rank {rank}"
            if exact or name not in ("o_proj", "down_proj"):
                assert torch.equal(actual, expected), where
                continue
            # Float sums in another order move a value across a rounding boundary now and then: one step of the
            # output's int8. bfloat16 rounds both results, each by half of 1/128 of at most 128 steps.
            (step,) = getattr(made, name).quant_method.runs[0].tensors(getattr(made, name))[3].reshape(1)
            tolerance = float(step) * (1 + (1 if dtype == torch.bfloat16 else 0))
            difference = (actual.float() - expected.float()).abs().max()
            assert float(difference) <= tolerance, f"{where}: {float(difference)} over {tolerance}"
