"""Decoding on the GPU: bytelane, transformers' own Gemma quantizer and bfloat16, in one run.

    python benchmarks/gpu_generate.py MODEL [--tokens 128] [--prompt 64] [--no-compile] [--json FILE]

MODEL is a checkpoint, for instance of `build_gemma.py e2b`. Each candidate is loaded alone, reads the same prompt and
writes the same number of tokens, greedily. Eager means transformers' own loop; compiled means a static cache, with
which transformers compiles the step and replays it as a CUDA graph. bfloat16 is the same architecture with random
weights. `weights` are the bytes of parameters and buffers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
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
from gpu_linear import environment

RESULTS = Path(__file__).parent / "results" / "gpu_generate.json"


def random_bfloat16(folder: Path) -> PreTrainedModel:
    """The architecture with random bfloat16 weights on the GPU."""
    config = without_towers(load_config(folder))
    config.quantization_config = None
    model = build_skeleton(config, dtype=torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        made = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.02
        owner._parameters[name.rpartition(".")[2]] = torch.nn.Parameter(made, requires_grad=False)
    model.tie_weights()
    return model.cuda().eval()


def candidates(folder: Path) -> dict[str, Callable[[], PreTrainedModel]]:
    return {
        "bytelane integer": lambda: bytelane.load_model(folder, device="cuda", text_only=True),
        "transformers' own": lambda: AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map="cuda"
        ).eval(),
        "bfloat16": lambda: random_bfloat16(folder),
    }


def tokens_per_second(model: PreTrainedModel, prompt: torch.Tensor, tokens: int, rounds: int, compiled: bool) -> float:
    """The median over rounds of new tokens a second after the first; one round before them is not counted."""
    rates = []
    for round_ in range(rounds + 1):
        seconds = []
        for count in (1, tokens):
            cache = {cache_keyword(model): make_static_cache(model, prompt.shape[1] + tokens)} if compiled else {}
            options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": count, "max_new_tokens": count}
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(prompt, attention_mask=torch.ones_like(prompt), **cache, **options)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if round_:
            rates.append((tokens - 1) / (seconds[1] - seconds[0]))
    return statistics.median(rates)


def weight_bytes(model: PreTrainedModel) -> int:
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 1000, (1, arguments.prompt), generator=generator).cuda()
    for name, load in candidates(folder).items():
        if arguments.only and arguments.only not in name:
            continue
        model = load()
        modes = [False] if arguments.no_compile or name == "transformers' own" else [False, True]
        for compiled in modes:
            rate = tokens_per_second(model, prompt, arguments.tokens, arguments.rounds, compiled)
            result = {"candidate": name, "mode": "compiled" if compiled else "eager", "tokens_per_second": rate}
            print(result, flush=True)
            yield result | {"weight_bytes": weight_bytes(model), "peak_bytes": torch.cuda.max_memory_allocated()}
        del model
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", help="candidates whose name has this in it")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = list(measure(arguments.model, arguments))
    table = Table("candidate", "mode", "tokens/s", "weights GB", "peak GB")
    for r in results:
        sizes = (f"{r['weight_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.2f}")
        table.add_row(r["candidate"], r["mode"], f"{r['tokens_per_second']:.1f}", *sizes)
    Console(width=100).print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {"prompt": arguments.prompt, "tokens": arguments.tokens}
    arguments.json.write_text(json.dumps({**environment(), **settings, "results": results}, indent=1) + "\n")
    print(json.dumps({f"{r['candidate']}, {r['mode']}": round(r["tokens_per_second"], 1) for r in results}))


if __name__ == "__main__":
    main()
