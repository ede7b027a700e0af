"""Decoding on the GPU: bytelane, transformers' own Gemma quantizer and bfloat16, in one run.

    python benchmarks/gpu_generate.py MODEL [MODEL ...] [--tokens 128] [--prompt 64] [--compile] [--json FILE]

MODEL is a checkpoint, for instance of `build_gemma.py e2b` or `build_llama.py`. Each candidate is a process of its own;
it reads the same prompt and writes the same number of tokens, greedily, one sequence.

| mode | what |
| --- | --- |
| eager | transformers' `generate` |
| graph | `bytelane.step_graph`: the eager step captured as a CUDA graph |
| compiled | `generate` with a static cache, for which transformers compiles the step (minutes for a large model) |

bfloat16 is the same architecture with random weights. `weights` are the bytes of parameters and buffers, `peak` the
most that torch held. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import bytelane
from bytelane.cache import cache_keyword
from bytelane.models import build_skeleton, load_config, without_towers
from bytelane.static_cache import make_static_cache
from bytelane.step_graph import StepGraph
from gpu_linear import environment

RESULTS = Path(__file__).parent / "results" / "gpu_generate.json"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def random_bfloat16(folder: Path) -> PreTrainedModel:
    """The architecture with random bfloat16 weights."""
    config = without_towers(load_config(folder))
    config.quantization_config = None
    model = build_skeleton(config, dtype=torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        made = torch.randn(parameter.shape, device=DEVICE, dtype=torch.bfloat16) * 0.02
        owner._parameters[name.rpartition(".")[2]] = torch.nn.Parameter(made, requires_grad=False)
    model.tie_weights()
    return model.to(DEVICE).eval()


def transformers_own(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=DEVICE.type).eval()


CANDIDATES: dict[str, Callable[[Path], PreTrainedModel]] = {
    "bytelane": lambda folder: bytelane.load_model(folder, device=DEVICE, text_only=True),
    "transformers": transformers_own,
    "bfloat16": random_bfloat16,
}


def generate_seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int, compiled: bool) -> float:
    """Seconds of the tokens after the first, by transformers' `generate`."""
    seconds = []
    for count in (1, tokens):
        cache = {cache_keyword(model): make_static_cache(model, prompt.shape[1] + tokens)} if compiled else {}
        options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": count, "max_new_tokens": count}
        synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **cache, **options)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1] - seconds[0]


def graph_seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of the tokens after the second, and of what comes before: the prompt, the capture, two tokens."""
    synchronize()
    start = time.perf_counter()
    graph = StepGraph(model, prompt.shape[1] + tokens)
    logits = graph.read(prompt[0])
    logits = graph.step(int(logits.argmax()))
    synchronize()
    begun = time.perf_counter()
    for _ in range(tokens - 1):
        logits = graph.step(int(logits.argmax()))
    synchronize()
    return time.perf_counter() - begun, begun - start


def modes_of(name: str, compiled: bool) -> list[str]:
    if name == "transformers":
        return ["eager"]
    return ["eager", "graph", *(["compiled"] if compiled else [])]


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All modes of a candidate, in this process; the first round of each is not counted."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 250, (1, arguments.prompt), generator=generator).to(DEVICE)
    start = time.perf_counter()
    model = CANDIDATES[name](folder)
    synchronize()
    load = time.perf_counter() - start
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    found = []
    for mode in modes_of(name, arguments.compile):
        rates, first = [], 0.0
        for round_ in range(arguments.rounds + 1):
            if mode == "graph":
                spent, first = graph_seconds(model, prompt, arguments.tokens)
            else:
                spent = generate_seconds(model, prompt, arguments.tokens, mode == "compiled")
            if round_:
                rates.append((arguments.tokens - 1) / spent)
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
        found.append(
            {
                "candidate": name,
                "mode": mode,
                "tokens_per_second": statistics.median(rates),
                "first_seconds": first,
                "load_seconds": load,
                "weight_bytes": sum(tensors.values()),
                "peak_bytes": peak,
            }
        )
        print(found[-1], file=sys.stderr, flush=True)
    return found


def in_a_process(name: str, folder: Path, options: list[str], timeout: float) -> list[dict[str, Any]]:
    """`measure` in a process of its own; nothing where the candidate fails, which is said."""
    command = [sys.executable, __file__, str(folder), "--worker", name, *options]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{name} failed on {folder}: {error}", flush=True)
        return []
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, with commas")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a candidate")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=sorted(CANDIDATES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.models[0], arguments)))
        return
    settings = {"prompt": arguments.prompt, "tokens": arguments.tokens, "rounds": arguments.rounds}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    options += ["--compile"] if arguments.compile else []
    table = Table("model", "candidate", "mode", "tokens/s", "weights GB", "peak GB")
    results: list[dict[str, Any]] = []
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for folder in arguments.models:
        gemma = load_config(folder).model_type.startswith("gemma")
        for name in arguments.only.split(","):
            if name == "transformers" and not gemma:
                continue  # its quantizer reads Gemma's storage alone
            for r in in_a_process(name, folder, options, arguments.timeout):
                results.append({"model": folder.name, **r})
                sizes = (f"{r['weight_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.2f}")
                table.add_row(folder.name, r["candidate"], r["mode"], f"{r['tokens_per_second']:.1f}", *sizes)
            written = {**environment(), **settings, "results": results}
            arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    Console(width=100).print(table)
    print(json.dumps({f"{r['model']} {r['candidate']} {r['mode']}": r["tokens_per_second"] for r in results}))


if __name__ == "__main__":
    main()
