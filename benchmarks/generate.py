"""Decode and prefill rates of a checkpoint beside its reference, in one run.

    python benchmarks/generate.py MODEL [--reference FLOAT_MODEL [--gguf FILE]] [--transformers] [--tokens 64]

Every candidate reads the same random prompt and writes the same number of tokens, greedily and without stopping; the
candidates take turns, and the medians over the rounds are reported, so that a noisy machine treats them alike. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import bytelane
from bytelane import generation
from bytelane.cli.output import size
from bytelane.models import resolve_checkpoint
from bytelane.quantize import load_float_model
from bytelane.sampling import Sampling

Generate = Callable[[torch.Tensor, int], object]
"""Writes so many tokens after a prompt `[1, n]`, greedily, without stopping."""


def by_transformers(model: PreTrainedModel) -> Generate:
    """Transformers' `generate`."""

    def run(prompt: torch.Tensor, tokens: int) -> object:
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, attention_mask=mask, pad_token_id=0
        )

    return run


def by_bytelane(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Generate:
    """The loop of `bytelane run`."""
    model.generation_config.eos_token_id = None
    greedy = Sampling(greedy=True)

    def run(prompt: torch.Tensor, tokens: int) -> object:
        return generation.generate(
            model, tokenizer, prompt, max_new_tokens=tokens, sampling=greedy, on_text=lambda _: None
        )

    return run


def measure(generate: Generate, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and seconds of each token after the first."""
    with torch.inference_mode():
        start = time.perf_counter()
        generate(prompt, 1)
        first = time.perf_counter()
        generate(prompt, tokens)
        end = time.perf_counter()
    prefill = first - start
    return prefill, (end - first - prefill) / max(tokens - 1, 1)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of everything the model holds, tied tensors once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", type=Path, help="a float model, run in bfloat16")
    parser.add_argument("--gguf", help="the GGUF file in the reference's folder")
    parser.add_argument("--transformers", action="store_true", help="also transformers' own quantizer on MODEL")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    folder = resolve_checkpoint(arguments.model)
    load: dict[str, Callable[[], PreTrainedModel]] = {"bytelane integer": lambda: bytelane.load_model(folder)}
    if arguments.reference:
        load["bfloat16"] = lambda: load_float_model(
            arguments.reference, gguf_file=arguments.gguf, dtype=torch.bfloat16
        )[0]
    if arguments.transformers:
        load["transformers' own"] = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    models = {name: make() for name, make in load.items()}
    generator = torch.Generator().manual_seed(0)
    vocabulary = next(iter(models.values())).config.get_text_config().vocab_size
    prompt = torch.randint(10, vocabulary - 10, (1, arguments.prompt), generator=generator)
    runs = {name: by_transformers(model) for name, model in models.items()}
    runs["bytelane integer"] = by_bytelane(models["bytelane integer"], generation.load_tokenizer(folder))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for run in runs.values():
        measure(run, prompt, 2)
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(measure(run, prompt, arguments.tokens))
    results = []
    for name, model in models.items():
        prefill = statistics.median(t[0] for t in times[name])
        token = statistics.median(t[1] for t in times[name])
        rates = {"prefill_tokens_per_second": arguments.prompt / prefill, "decode_tokens_per_second": 1 / token}
        results.append({"candidate": name, "bytes": weight_bytes(model), **rates})
    table = Table(title=f"{folder.name}: prompt {arguments.prompt}, {arguments.threads} threads", title_justify="left")
    for column in ("candidate", "holds", "prefill tokens/s", "decode tokens/s", "decode ratio"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    base = results[-1]["decode_tokens_per_second"]
    for r in results:
        decode = r["decode_tokens_per_second"]
        prefill_rate = f"{r['prefill_tokens_per_second']:.1f}"
        table.add_row(r["candidate"], size(r["bytes"]), prefill_rate, f"{decode:.2f}", f"{decode / base:.2f}")
    Console(width=100).print(table)
    print(json.dumps({"model": str(arguments.model), "threads": arguments.threads, "results": results}))


if __name__ == "__main__":
    main()
