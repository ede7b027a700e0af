"""Whole models on the GPU: bytelane, transformers' own Gemma quantizer and bfloat16, in one run.

    python benchmarks/gpu_generate.py MODEL [MODEL ...] [--tokens 128] [--prompt 512] [--batch 1,8] [--json FILE]

MODEL is a checkpoint, for instance of `build_llama.py` (`--shape llama1b`, too) or `build_gemma.py e2b --row-scales`,
whose tables transformers' own quantizer can load. Each candidate is a process of its own with a time limit of its own
(`--timeout`), and what it has measured by then counts; JSON is written after each. All read the same prompt and write
the same number of tokens, greedily.

| mode | what |
| --- | --- |
| eager | the model called token by token, with the cache it generates with |
| graph | `bytelane.step_graph`: the eager step captured as a CUDA graph; one sequence |
| compiled | `generate` with a static cache, for which transformers compiles the step (minutes for a large model) |

bfloat16 is the same architecture with random weights. `prefill` and `decode` are tokens a second, of all sequences
together; `weights` the bytes of parameters and buffers, `peak` the most that torch held. Before bytelane's first token
its kernels are compiled (`bytelane.kernels.compile_ahead`): how many, by how many processes and how long is printed.
`--profile` says where a token's time goes: launches, and GPU seconds by kind of kernel, beside the time of the step.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import bytelane
from bytelane.cache import cache_keyword, make_cache
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


OURS = re.compile(
    "decode_linear|rows_linear|fused_linear|codes_linear|quantize_planes|weight_only_linear|digits_linear|gather_rows|norm_rows"
    "|requantize_rows|step_heads|gate_row|join_row"
)
ATTENTION = re.compile("fmha|flash|attention|softmax|attend_", re.IGNORECASE)
MATMUL = re.compile("gemm|gemv|cutlass|nvjet", re.IGNORECASE)


def compiled_seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds of the tokens after the first, by transformers' `generate`."""
    seconds = []
    for count in (1, tokens):
        cache = {cache_keyword(model): make_static_cache(model, prompt.shape[1] + tokens)}
        options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": count, "max_new_tokens": count}
        synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **cache, **options)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1] - seconds[0]


@torch.inference_mode()
def eager_seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of the tokens after the first."""
    run: Any = model
    given = {cache_keyword(model): make_cache(model), "use_cache": True, "logits_to_keep": 1}
    synchronize()
    start = time.perf_counter()
    ids = run(prompt, **given).logits[:, -1:].argmax(-1)
    synchronize()
    begun = time.perf_counter()
    for _ in range(tokens - 1):
        ids = run(ids, **given).logits[:, -1:].argmax(-1)
        ids.tolist()  # a stream shows every token
    return begun - start, time.perf_counter() - begun


def graph_seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """The same of a captured step; the capture and the first replay are in neither."""
    graph = StepGraph(model, prompt.shape[1] + tokens + 1)
    synchronize()
    start = time.perf_counter()
    token = int(graph.read(prompt[0]).argmax())
    begun = time.perf_counter()
    token = int(graph.step(token).argmax())
    captured = time.perf_counter()
    for _ in range(tokens - 1):
        token = int(graph.step(token).argmax())
    return begun - start, time.perf_counter() - captured


def profiled(model: PreTrainedModel, prompt: torch.Tensor) -> dict[str, Any]:
    """Launches of an eager step, GPU seconds of each kind of kernel in it, and a replay's seconds beside them."""
    graph, eager = (StepGraph(model, prompt.shape[1] + 16) for _ in range(2))
    token = int(graph.read(prompt[0]).argmax())
    eager.read(prompt[0])
    replays = []
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        token = int(graph.step(token).argmax())
        replays.append(time.perf_counter() - start)
    eager.call(token)
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as trace:
        eager.call(token)
        synchronize()
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in trace.events():
        if event.device_type != DeviceType.CUDA:
            continue
        kinds = {"ours": OURS, "attention": ATTENTION, "matmul": MATMUL}
        kind = next((kind for kind, names in kinds.items() if names.search(event.name)), "other")
        seconds[kind] += event.device_time * 1e-6
        launches[kind] += 1
    return {"launches": dict(launches), "gpu_seconds": dict(seconds), "replay_seconds": statistics.median(replays[1:])}


def modes_of(name: str, batch: int, compiled: bool) -> list[str]:
    graph = name != "transformers" and batch == 1
    return ["eager", *(["graph"] if graph else []), *(["compiled"] if compiled and graph else [])]


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All modes and batches of a candidate, in this process; the first round of each is not counted."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    model = CANDIDATES[name](folder)
    synchronize()
    common: dict[str, Any] = {"candidate": name, "load_seconds": time.perf_counter() - start}
    if name == "bytelane" and DEVICE.type == "cuda":
        from bytelane.kernels.compile_ahead import compile_ahead

        batches = [int(batch) for batch in arguments.batch.split(",")]
        common["compile"] = asdict(compile_ahead(model, rows=[n * b for b in batches for n in (1, arguments.prompt)]))
        print(f"{name}: {common['compile']}", file=sys.stderr, flush=True)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    common["weight_bytes"] = sum(tensors.values())
    for batch in map(int, arguments.batch.split(",")):
        prompt = torch.randint(10, 250, (batch, arguments.prompt), generator=generator).to(DEVICE)
        for mode in modes_of(name, batch, arguments.compile):
            times: list[tuple[float, float]] = []
            for round_ in range(arguments.rounds + 1):
                if mode == "compiled":
                    spent = (math.nan, compiled_seconds(model, prompt, arguments.tokens))
                else:
                    spent = (graph_seconds if mode == "graph" else eager_seconds)(model, prompt, arguments.tokens)
                times += [spent] if round_ else []
            read, wrote = (statistics.median(column) for column in zip(*times, strict=True))
            row = {
                **common,
                "mode": mode,
                "batch": batch,
                "prefill_tokens_per_second": None if math.isnan(read) else prompt.numel() / read,
                "tokens_per_second": batch * (arguments.tokens - 1) / wrote,
                "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0,
            }
            if arguments.profile and mode == "graph" and DEVICE.type == "cuda":
                row["step"] = profiled(model, prompt)
            print(row, file=sys.stderr, flush=True)
            yield row


def in_a_process(name: str, folder: Path, options: list[str], timeout: float) -> list[dict[str, Any]]:
    """`measure` in a process of its own; a candidate that fails, or takes too long, is named and gives what it has."""
    command = [sys.executable, __file__, str(folder), "--worker", name, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
        if process.returncode:
            print(f"{name} on {folder} ended with {process.returncode} (-9: after {timeout} s)", flush=True)
    # what comes after the last line's end was cut off
    return [json.loads(line) for line in printed.rpartition("\n")[0].splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", default="1,8", help="numbers of sequences, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, with commas")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    parser.add_argument("--profile", action="store_true", help="where a token's time goes")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a candidate")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=sorted(CANDIDATES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.worker:
        for row in measure(arguments.worker, arguments.models[0], arguments):
            print(json.dumps(row), flush=True)
        return
    settings = {name: getattr(arguments, name) for name in ("prompt", "tokens", "batch", "rounds")}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    options += [f"--{name}" for name in ("compile", "profile") if getattr(arguments, name)]
    table = Table("model", "candidate", "mode", "batch", "prefill/s", "decode/s", "weights GB", "peak GB")
    results: list[dict[str, Any]] = []
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for folder in arguments.models:
        gemma = load_config(folder).model_type.startswith("gemma")
        for name in arguments.only.split(","):
            if name == "transformers" and not gemma:
                continue  # its quantizer reads Gemma's storage alone
            for r in in_a_process(name, folder, options, arguments.timeout):
                results.append({"model": folder.name, **r})
                read = r["prefill_tokens_per_second"]
                rates = ("" if read is None else f"{read:.0f}", f"{r['tokens_per_second']:.1f}")
                sizes = (f"{r['weight_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.2f}")
                table.add_row(folder.name, r["candidate"], r["mode"], str(r["batch"]), *rates, *sizes)
            written = {**environment(), **settings, "results": results}
            arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    Console(width=120).print(table)
    rates = {f"{r['model']} {r['candidate']} {r['mode']} {r['batch']}": r["tokens_per_second"] for r in results}
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
