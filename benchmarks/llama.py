"""Decode and prefill rates of a checkpoint beside llama.cpp on a GGUF file of the same model, in one run.

    python benchmarks/llama.py MODEL GGUF --llama-python LLAMA_ENVIRONMENT/bin/python [--threads 2] [--output FILE]

llama.cpp runs in a process of its own, from an environment of its own; it compiles for some minutes:

    python -m venv LLAMA_ENVIRONMENT && LLAMA_ENVIRONMENT/bin/pip install llama-cpp-python

MODEL is best made from the same file, with the file's width:

    bytelane quantize FOLDER MODEL --gguf FILE --text TEXT --default-bits 4 --bits lm_head=8 --embeddings 8

Both read the same random prompt and write the same number of tokens, greedily and without stopping. They take turns;
medians over the rounds are reported, and the ratio is that of the rounds' pairs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import bytelane
from bytelane import benchmark, generation
from bytelane.cli.output import size, write_json
from bytelane.models import resolve_checkpoint
from generate import by_bytelane, measure, weight_bytes

INSTALL = "python -m venv LLAMA_ENVIRONMENT && LLAMA_ENVIRONMENT/bin/pip install llama-cpp-python"


class Llama:
    """llama.cpp's process."""

    def __init__(self, python: Path, gguf: Path, threads: int, context: int) -> None:
        command = [str(python), str(Path(__file__).with_name("llama_worker.py")), str(gguf), str(threads), str(context)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"llama.cpp's process ended with code {self._process.wait()}. To install it: {INSTALL}")
        return json.loads(line)

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds of the prompt and of each token after the first."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"run {tokens} {' '.join(map(str, prompt))}\n")
        self._process.stdin.flush()
        prefill, token = self._answer()
        return prefill, token

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama-python", type=Path, default=Path(sys.executable), help="the Python that has llama_cpp")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the JSON to this file too")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    folder = resolve_checkpoint(arguments.model)
    llama = Llama(arguments.llama_python, arguments.gguf, arguments.threads, arguments.prompt + arguments.tokens)
    model = bytelane.load_model(folder)
    run = by_bytelane(model, generation.load_tokenizer(folder))
    vocabulary = min(model.config.get_text_config().vocab_size, llama.about["vocabulary"])
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, vocabulary - 10, (1, arguments.prompt), generator=generator)
    ids = prompt[0].tolist()
    runs = {
        "bytelane": lambda: measure(run, prompt, arguments.tokens),
        "llama.cpp": lambda: llama.run(ids, arguments.tokens),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(arguments.rounds + 1):
        for name in sorted(runs, reverse=turn % 2 == 1):
            spent = runs[name]()
            if turn:
                times[name].append(spent)
    llama.close()
    results = {}
    for name, held in (("bytelane", weight_bytes(model)), ("llama.cpp", arguments.gguf.stat().st_size)):
        prefill, token = (statistics.median(t[i] for t in times[name]) for i in (0, 1))
        results[name] = {
            "bytes": held,
            "prefill_tokens_per_second": arguments.prompt / prefill,
            "decode_tokens_per_second": 1 / token,
        }
    pairs = list(zip(times["llama.cpp"], times["bytelane"], strict=True))
    ratios = {
        what: statistics.median(theirs[i] / ours[i] for theirs, ours in pairs)
        for i, what in enumerate(("prefill", "decode"))
    }
    title = f"{folder.name}: prompt {arguments.prompt}, {arguments.threads} threads"
    table = Table("", "holds", "prefill tokens/s", "decode tokens/s", title=title, title_justify="left")
    for name, r in results.items():
        rates = (f"{r[f'{what}_tokens_per_second']:.1f}" for what in ("prefill", "decode"))
        table.add_row(name, size(r["bytes"]), *rates)
    table.add_row("ours over theirs", "", *(f"{ratios[what]:.2f}" for what in ("prefill", "decode")))
    Console(width=100).print(table)
    found = {
        **benchmark.describe(),
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "llama_cpp_python": llama.about["version"],
        "results": results,
        "ratios": ratios,
    }
    if arguments.output is not None:
        write_json(arguments.output, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
