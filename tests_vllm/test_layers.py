"""vLLM's layers with bytelane's methods give bytelane's bits: every width, storage and side, on one rank and two."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

import ranks
from bytelane.kernels.cpu import supported_isas
from checkpoints import COMPRESSED, GEMMA, hand_made

BITS = range(2, 9)

# An odd number of heads' worth of inputs: cuts of 3, 5 and 7 bits fall inside a byte.
UNEVEN = {"intermediate_size": 92}


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Checkpoints by name: options of `hand_made`."""
    made: dict[str, dict[str, Any]] = {}
    for bits in BITS:
        made[f"packed{bits}"] = {"bits": bits, "embeddings": True, "head": True, **UNEVEN}
    made |= {
        "padded3": {"bits": 3, "padded": True, "intermediate_size": 88},
        "bytes8": {"bits": 8, "fmt": "int-quantized"},
        "bytes4": {"bits": 4, "fmt": "int-quantized"},
        "long8": {"bits": 8, "fmt": "int-quantized", "intermediate_size": 2112},
        "halves": {"bits": 4, "scale_dtype": torch.bfloat16},
        "input-only": {"bits": 4, "sides": (True, False), "head": True},
        "biased": {"bits": 4, "attention_bias": True},
        "tied": {"bits": 4, "embeddings": True, "tie_word_embeddings": True},
        "gemma2": {"storage": GEMMA, "bits": 2, "embeddings": True, "head": True},
        "gemma4": {"storage": GEMMA, "bits": 4, "embeddings": True, "kv": True},
        "gemma8": {"storage": GEMMA, "bits": 8, "head": True},
        "gemma-tied": {"storage": GEMMA, "bits": 4, "embeddings": True, "tie_word_embeddings": True},
    }
    return list(made.items())


FLOAT_SUMS: list[tuple[str, dict[str, Any]]] = [
    ("groups", {"bits": 4, "group": 16, "embeddings": True}),
    ("output-only", {"bits": 4, "sides": (False, True)}),
]


def write(directory: Path, options: dict[str, Any]) -> Path:
    """Write a checkpoint; where it quantizes no output, one projection does, which makes it wNa8o8."""
    options = dict(options)
    storage = options.pop("storage", COMPRESSED)
    made = hand_made(storage, **options)
    if storage == COMPRESSED and not options.get("sides", (True, True))[1]:
        groups = made.quantization["config_groups"]
        int8 = groups["group_0"]["input_activations"]
        groups["group_9"] = {**groups["group_0"], "targets": ["re:.*layers.1.mlp.up_proj$"], "output_activations": int8}
        made.tensors["model.layers.1.mlp.up_proj.output_scale"] = torch.tensor([0.05])
    return made.write(directory)


def check_reduction(rank: int, world: int) -> None:
    """Sums of accumulators at the edges of int32 and of float32's integers, on both paths of the reduction."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    from bytelane.integrations.vllm.reduce import EXACT_FLOAT32, all_reduce_accumulators, largest_sum, reduced_bytes

    generator = torch.Generator().manual_seed(3)
    for bits, inputs in ((4, 16384), (8, 1024), (8, 1025), (8, 131071)):
        bound = largest_sum(bits, inputs)
        assert reduced_bytes(2, 3, bits, inputs, "cpu") == 24 * (1 if bound <= EXACT_FLOAT32 else 2)
        edge = bound // world
        parts = [
            torch.randint(-edge, edge + 1, (4, 33, 1), generator=generator, dtype=torch.int32) for _ in range(world)
        ]
        for part in parts:
            part[0, :4, 0] = torch.tensor([edge, -edge, edge - 1, 1 - edge])
        total = torch.stack(parts).to(torch.int64).sum(0)
        found = all_reduce_accumulators(parts[rank], bits, inputs, tensor_model_parallel_all_reduce)
        assert torch.equal(found.to(torch.int64), total), (bits, inputs)


def one_rank_or_two(rank: int, world: int, port: int, root: str, dtype: torch.dtype) -> None:
    """All cases on one rank; run in a process of its own."""
    torch.set_num_threads(1)
    with ranks.parallel(rank, world, port):
        check_reduction(rank, world)
        for name, options in cases():
            ranks.check(Path(root) / name, dtype, rank, world, bias=options.get("attention_bias", False))
        for name, _ in FLOAT_SUMS:
            ranks.check(Path(root) / name, dtype, rank, world, exact=world == 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, options in itertools.chain(cases(), FLOAT_SUMS):
        write(folder / name, options)
    return folder


@pytest.mark.parametrize(
    ("world", "dtype"),
    [
        (2, torch.bfloat16),
        pytest.param(1, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1, torch.float32, marks=pytest.mark.slow),
        pytest.param(2, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_every_layer_gives_the_bits_of_load_model(root: Path, world: int, dtype: torch.dtype) -> None:
    multiprocessing.spawn(one_rank_or_two, (world, ranks.free_port(), str(root), dtype), nprocs=world)


def stock(rank: int, port: int, directory: str) -> None:
    """The merged q/k/v of vLLM's own wNa8o8 layers, against the same emulation with each part's own scales."""
    from safetensors.torch import load_file
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    import bytelane

    raw = json.loads((Path(directory) / "config.json").read_text())["quantization_config"]
    tensors = load_file(Path(directory) / "model.safetensors")
    reference = bytelane.load_model(directory, dtype=torch.bfloat16, numerics="emulated").model.layers[0].self_attn
    parts = {"q": reference.q_proj, "k": reference.k_proj, "v": reference.v_proj}
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16) * 2
    with ranks.parallel(rank, 1, port):
        config = CompressedTensorsConfig.from_config(raw)
        config.packed_modules_mapping = dict(ranks.PACKED)
        layer = QKVParallelLinear(
            64, 16, 4, 2, bias=False, quant_config=config, params_dtype=torch.bfloat16, prefix="model.layers.0.qkv_proj"
        )
        for part in parts:
            for name, parameter in list(layer.named_parameters()):
                stored = tensors[f"model.layers.0.self_attn.{part}_proj.{name}"]
                parameter.weight_loader(parameter, stored, part)
        layer.quant_method.process_weights_after_loading(layer)
        found = dict(zip(parts, layer(x)[0].split([64, 32, 32], -1), strict=True))
    steps = {n: float((found[n] - p(x)).abs().max() / p.output_scale) for n, p in parts.items()}
    assert steps["v"] == 0, steps  # loaded last, so its scales are the ones that stay
    assert min(steps["q"], steps["k"]) > 1, steps


@pytest.mark.skipif(
    not {"avx512vnni", "avx512vbmi"} & set(supported_isas()),
    reason="of vLLM's builds for x86 only those for AVX-512 have its int4 operation",
)
def test_vllms_own_merged_layers_keep_the_last_parts_scales(tmp_path: Path) -> None:
    """Why the plugin has merged layers of its own: this is what `test_every_layer...` would see without it."""
    write(tmp_path / "model", {"bits": 4})
    multiprocessing.spawn(stock, (ranks.free_port(), str(tmp_path / "model")), nprocs=1)
