"""What a step of tuning costs: SmolLM2-135M's shapes with random weights, 4-bit layers with int8 on both sides.

    python benchmarks/tune_step.py [--batch 16,32] [--steps 20] [--modes eager,recorded] [--json FILE]

Beside the time of a step: the kernels of one, by kind, from torch's profiler, and what the GPU could do at best: the
multiplications at the rate of a large bfloat16 product measured here. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from bytelane.quantize import Recipe
from bytelane.tune import TuneSettings, prepare, tune

RECIPE = {"default_bits": 4, "embeddings": 8, "bits": {"^lm_head$": 8}, "head": "weights", "range": "minmax"}


def shapes(layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def product_rate(device: torch.device) -> float:
    """Operations a second of a large bfloat16 product."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for count in (2, 8):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            a @ b
        synchronize(device)
    return 2 * size**3 * count / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def operations(config: LlamaConfig, tokens: int, *, kept: bool) -> float:
    """Of a step's matmuls: forward and twice that backward, and the teacher's forward or its head alone."""
    hidden, wide = config.hidden_size, config.intermediate_size
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    layer = hidden * (2 * hidden + 2 * kv + 3 * wide)
    head = hidden * config.vocab_size
    body = layer * config.num_hidden_layers
    return 2.0 * tokens * (3 * (body + head) + head + (0 if kept else body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="16,32")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--modes", default="eager,recorded")
    parser.add_argument("--top", type=int, default=25, help="kernels to list")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    run = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    torch.manual_seed(0)
    config = shapes(given.layers, given.vocabulary)
    teacher = LlamaForCausalLM(config).eval()
    ceiling = product_rate(run.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "product_tflops": ceiling / 1e12,
        "steps": [],
    }
    for batch in map(int, given.batch.split(",")):
        windows = list(torch.randint(0, config.vocab_size, (2 * batch, given.window)))
        for mode in given.modes.split(","):
            student = prepare(copy.deepcopy(teacher).to(run.device), Recipe.of(RECIPE), windows[:2])
            settings = TuneSettings(steps=given.steps, batch=batch, keep_teacher=True)
            marks: list[float] = []
            torch.cuda.reset_peak_memory_stats() if run.device.type == "cuda" else None
            watch = profile(activities=[ProfilerActivity.CUDA if run.device.type == "cuda" else ProfilerActivity.CPU])

            def note(_: str, done: int, __: int) -> None:
                marks.append(time.perf_counter())  # noqa: B023
                if done == given.steps - 3:
                    watch.start()  # noqa: B023

            report = tune(student, teacher, windows, settings, accelerator=run, eager=mode == "eager", progress=note)
            watch.stop()
            # The first steps compile or fill a queue, the last ones are watched.
            early, late = max(2, given.steps // 4), given.steps - 4
            seconds = (marks[late] - marks[early]) / (late - early)
            tokens = batch * given.window
            least = operations(config, tokens, kept=True) / ceiling
            cost = "self_device_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
            events = sorted(
                ((getattr(e, cost), e.count, e.key) for e in watch.key_averages() if getattr(e, cost)), reverse=True
            )
            line = {
                "mode": mode,
                "batch": batch,
                "seconds": round(seconds, 5),
                "tokens_per_second": round(tokens / seconds),
                "least_seconds": round(least, 5),
                "kernels": round(sum(count for _, count, _ in events) / 3),
                "kernel_seconds": round(sum(spent for spent, _, _ in events) / 3e6, 5),
                "start_seconds": report.start_seconds,
                "peak_bytes": report.peak_bytes,
            }
            result["steps"].append(line)
            print(json.dumps(line), flush=True)
            for spent, count, name in events[: given.top]:
                print(f"{spent / 3e3:9.3f} ms {count / 3:7.1f}  {name[:110]}")
            if given.json is not None:
                given.json.write_text(json.dumps(result), encoding="utf-8")
            del student
    print(json.dumps(result))


if __name__ == "__main__":
    main()
