"""An engine on a tiny Llama of mixed widths: every layer's inputs and outputs, in any batch, on 1 and 2 ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bytelane
import tiny
from bytelane.checkpoint import KVScales
from bytelane.scheme import EmbeddingScheme, LinearScheme, WeightScheme
from layerwise import check_records, logprobs_and_noise

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths 2, 3, 4, 5 and 8, parts of different widths merged, packed table and head, an input-only layer."""
    directory = tmp_path_factory.mktemp("engine") / "model"
    config = tiny.config("llama", dtype="bfloat16", head_dim=32, intermediate_size=160)
    schemes = tiny.default_schemes(config)
    schemes["model.layers.1.mlp.down_proj"] = LinearScheme(WeightScheme(5), quantize_output=False)
    schemes["model.layers.1.self_attn.o_proj"] = LinearScheme(WeightScheme(8))
    schemes["model.embed_tokens"] = EmbeddingScheme(WeightScheme(4, 16))
    tiny.write_random(directory, config, schemes)
    return directory


def run_engine(checkpoint: Path, world: int, *options: str) -> dict[str, Any]:
    out = checkpoint.parent / f"{world}{''.join(options)}.pt"
    environment = os.environ | {
        "PYTHONPATH": str(HERE),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if world == 2 else "0-1",
    }
    command = [sys.executable, HERE / "engine.py", checkpoint, str(world), out, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


@pytest.fixture(scope="module")
def one(checkpoint: Path) -> dict[str, Any]:
    return run_engine(checkpoint, 1)


@pytest.fixture(scope="module")
def two(checkpoint: Path) -> dict[str, Any]:
    return run_engine(checkpoint, 2)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> nn.Module:
    return bytelane.load_model(checkpoint, dtype=torch.bfloat16)


@pytest.mark.parametrize("batch", ["records_alone", "records_together"])
def test_linear_outputs_are_load_models_bits_in_any_batch(one: dict[str, Any], model: nn.Module, batch: str) -> None:
    assert one["layers"] == [2 * 4 + 2]
    rows = {len(x) for calls in one[batch][0].values() for x, _ in calls}
    assert len(rows) > 3, "batches of several sizes were meant to run"
    assert check_records(model, one[batch]) > 900


@pytest.mark.parametrize("batch", ["records_alone", "records_together"])
def test_two_ranks_give_the_same_bits(two: dict[str, Any], model: nn.Module, batch: str) -> None:
    assert len(two[batch]) == 2
    assert check_records(model, two[batch]) > 900


def test_two_ranks_agree_with_one_on_every_argmax_and_probability(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Not only the argmax: at these sizes the float operations between the layers do not depend on the ranks either."""
    for key in ("alone", "together", "again"):
        assert one[key] == two[key], key
    assert one["prompt_logprobs"] == two["prompt_logprobs"]


def test_chunked_prefill_and_prefix_caching_are_on(one: dict[str, Any]) -> None:
    longest = max(len(x) for x, _ in one["records_alone"][0]["model.layers.0.mlp.down_proj"])
    assert longest == 32, "the longest prompt has 48 tokens, and a step takes 32"
    assert one["cached"][-1] >= 32
    assert one["again"] == one["together"]


def test_bytes_reduced_are_the_models_in_the_documentation(two: dict[str, Any]) -> None:
    """docs/serving.md: 4 bytes an accumulator on CUDA; on CPUs 4 where sums stay below 2^24, 8 where they may not."""
    from bytelane.integrations.vllm.reduce import reduced_bytes

    hidden, heads, inner = 64, 128, 160
    expected = []
    for bits, columns in ((4, heads), (8, inner), (8, heads), (5, inner)):
        expected.append(reduced_bytes(1, hidden, bits, columns, "cpu"))
    assert expected == [4 * hidden] * 4
    for counted in two["reductions"]:
        steps = len(counted) // len(expected)
        assert len(counted) == steps * len(expected)
        for i, (shape, nbytes) in enumerate(counted):
            assert nbytes == shape[0] * expected[i % len(expected)], (shape, nbytes)


@pytest.mark.slow
def test_compiled_graphs_say_the_same(checkpoint: Path, one: dict[str, Any], model: nn.Module) -> None:
    """torch.compile stays on: the operations are opaque to it, with shapes it knows.

    What it fuses between them is rounded to bfloat16 less often than one by one. So log-probabilities may differ as far
    as other float operations move them, and a text may part where its two candidates are nearer than that.
    """
    compiled = run_engine(checkpoint, 1, "--compiled")
    sequences = [p + t for p, t in zip(one["prompts"], one["together"], strict=True)]
    other = bytelane.load_model(checkpoint, dtype=torch.bfloat16, float_ops="torch")
    near = 2 * max(logprobs_and_noise(model, other, ids)[1] for ids in sequences)
    for eager, other in zip(one["prompt_logprobs"], compiled["prompt_logprobs"], strict=True):
        for a, b in zip(eager[1:], other[1:], strict=True):
            assert max(abs(a[t] - b[t]) for t in a.keys() & b.keys()) <= near
    for i, (eager, other) in enumerate(zip(one["together"], compiled["together"], strict=True)):
        for place, (a, b) in enumerate(zip(eager, other, strict=True)):
            seen, seen_compiled = (found["together_logprobs"][i][place] for found in (one, compiled))
            assert max(abs(seen[t] - seen_compiled[t]) for t in seen.keys() & seen_compiled.keys()) <= near
            if a != b:
                assert seen[a] - seen[b] <= near, (i, place, seen, seen_compiled)
                break


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 4 in its mobile storage: per-layer embeddings, shared keys and values, KV-cache scales, a packed head."""
    directory = tmp_path_factory.mktemp("gemma") / "model"
    config = tiny.config("gemma4", dtype="bfloat16", head_dim=32, global_head_dim=64)
    schemes: dict[str, LinearScheme | EmbeddingScheme] = {
        name: LinearScheme(WeightScheme({"gate_proj": 2, "up_proj": 2, "per_layer_input_gate": 8}.get(leaf, 4)))
        for name in tiny.linear_names(config)
        if (leaf := name.rpartition(".")[2]) != "per_layer_model_projection"
    }
    schemes["lm_head"] = LinearScheme(WeightScheme(2), quantize_input=False, quantize_output=False)
    schemes["model.embed_tokens"] = EmbeddingScheme(WeightScheme(2))
    schemes["model.embed_tokens_per_layer"] = EmbeddingScheme(WeightScheme(4))
    scales = {"model.layers.0.self_attn": KVScales(0.01, 0.02)}
    tiny.write_random(directory, config, schemes, storage="gemma", kv_scales=scales)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_gemma_4_in_mobile_storage(gemma: Path, world: int) -> None:
    """Two ranks share one key and value head, so k and v are whole on both."""
    found = run_engine(gemma, world)
    model = bytelane.load_model(gemma, dtype=torch.bfloat16, kv_cache="float")
    assert check_records(model, found["records_together"]) > 900
