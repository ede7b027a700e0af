"""Prefill and decode under vLLM: its own layers beside bytelane's on one 4-bit checkpoint; bytelane's at 2 and 8 bits.

    .venv-vllm/bin/python benchmarks/vllm_serve.py [--rounds 2] [--wrap "nice -n 0"] [--compiled]

The checkpoint is a Llama of random codes: hidden 1024, MLP 4096, 8 layers, its table and head in bfloat16, since vLLM's
own layers know no other on a CPU. Each candidate is an engine in a process of its own; the candidates take turns, and
medians over the rounds are reported. Times are of whole `generate` calls, so scheduling and sampling are in them. The
last line is JSON.

The server under load is measured by vLLM's own tool; docs/serving.md has the commands.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREFILL, DECODE = 512, 32
CANDIDATES = {
    "vllm 4 bits": (4, "0"),
    "bytelane 4 bits": (4, "1"),
    "bytelane 2 bits": (2, "1"),
    "bytelane 8 bits": (8, "1"),
}


def write(directory: Path, bits: int) -> Path:
    """A Llama of random codes, pack-quantized, all its linear layers but the head wNa8o8."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig

    from bytelane.checkpoint import QuantizedModule, QuantizedTensors, write_checkpoint
    from bytelane.packing import pack_rows
    from bytelane.scheme import Kind, LinearScheme, Storage, WeightScheme, code_range

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    generator = torch.Generator().manual_seed(0)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    scheme, modules, plain = LinearScheme(WeightScheme(bits)), [], []
    low, high = code_range(bits)
    quantized = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, parameter in model.state_dict().items():
        owner, shape = name.rpartition(".")[0], tuple(parameter.shape)
        if owner not in quantized:
            value = torch.randn(shape, generator=generator) * 0.02 + (1.0 if "norm" in owner else 0.0)
            plain.append((name, value.to(torch.bfloat16)))
            continue
        codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)
        tensors = QuantizedTensors(
            pack_rows(codes, bits),
            torch.full((shape[0], 1), 2.0 / (shape[1] ** 0.5 * 2**bits)),
            torch.tensor(0.03),
            torch.tensor(0.03),
        )
        modules.append((QuantizedModule(owner, Kind.LINEAR, shape, scheme, Storage.PACK_QUANTIZED), tensors))
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    left = ["model.embed_tokens", "lm_head"]
    write_checkpoint(
        directory,
        config=raw,
        storage="compressed-tensors",
        modules=modules,
        plain=plain,
        kv_scales={},
        unquantized=left,
    )
    return directory


def worker(model: str, compiled: bool, repeats: int) -> None:
    """One candidate: prints milliseconds as JSON."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        max_model_len=1024,
        max_num_seqs=8,
        dtype="bfloat16",
        enable_prefix_caching=False,
    )

    def seconds(prompts: int, length: int, tokens: int) -> float:
        inputs = [{"prompt_token_ids": [(7 * i + p) % 8000 + 3 for i in range(length)]} for p in range(prompts)]
        sampling = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(inputs, sampling, use_tqdm=False)
        return time.perf_counter() - start

    seconds(1, PREFILL, 2)
    found: dict[str, list[float]] = {"prefill": [], "decode 1": [], "decode 8": []}
    for _ in range(repeats):
        found["prefill"].append(seconds(1, PREFILL, 1) * 1e3)
        for batch in (1, 8):
            first = seconds(batch, 16, 1)
            found[f"decode {batch}"].append((seconds(batch, 16, DECODE + 1) - first) / DECODE * 1e3)
    print("RESULT " + json.dumps({k: statistics.median(v) for k, v in found.items()}))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="engines of each candidate")
    parser.add_argument("--repeats", type=int, default=3, help="measurements in each engine")
    parser.add_argument("--wrap", default="", help="a command put before each engine's")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, as `vllm serve` runs by default")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.compiled, arguments.repeats)
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    with tempfile.TemporaryDirectory() as folder:
        models = {bits: write(Path(folder) / f"w{bits}", bits) for bits in {b for b, _ in CANDIDATES.values()}}
        for _ in range(arguments.rounds):
            for name, (bits, switch) in CANDIDATES.items():
                environment = os.environ | {
                    "BYTELANE_VLLM": switch,
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_LOGGING_LEVEL": "ERROR",
                }
                command = [*shlex.split(arguments.wrap), sys.executable, __file__, "--worker", str(models[bits])]
                command += ["--repeats", str(arguments.repeats), *(["--compiled"] if arguments.compiled else [])]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
                if done.returncode or not lines:
                    sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
                results[name].append(json.loads(lines[-1].removeprefix("RESULT ")))
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in results.items()}
    base = medians["vllm 4 bits"]
    for name, row in medians.items():
        cells = "  ".join(f"{k} {v:8.1f} ms ({base[k] / v:4.2f}x)" for k, v in row.items())
        print(f"{name:16} {cells}")
    print(json.dumps({"prefill_tokens": PREFILL, "compiled": arguments.compiled, "milliseconds": medians}))


if __name__ == "__main__":
    main()
