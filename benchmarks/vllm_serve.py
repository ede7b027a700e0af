"""Prefill and decode under vLLM: its own layers beside bytelane's on one 4-bit checkpoint; bytelane's at 2 and 8 bits.

    .venv-vllm/bin/python benchmarks/vllm_serve.py                     # a Llama of a billion random codes
    .venv-vllm/bin/python benchmarks/vllm_serve.py --model smollm2-w4  # a checkpoint of yours

The random Llama has Llama 3.2 1B's layers (hidden 2048, MLP 8192, 16 layers) and 32000 words, its table and head in
bfloat16, since vLLM's own layers know no other on a CPU. A checkpoint of yours must have 4-bit layers with both
scales; its table is made bfloat16 for the comparison, for the same reason.

Both candidates are engines in processes of their own that are ready at once and take turns, and medians over the
rounds are reported. Times are of whole `generate` calls, so scheduling and sampling are in them. On a machine shared
with other work, `--lock FILE` holds a lock while something is timed and `--realtime` (as root) puts the engine before
everything else meanwhile. The last line is JSON.

The server under load is measured by vLLM's own tool: vllm_load.py.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

DECODE = 32
GROUPS = (
    {"vllm 4 bits": (4, "0"), "bytelane 4 bits": (4, "1")},
    {"bytelane 2 bits": (2, "1")},
    {"bytelane 8 bits": (8, "1")},
)
"""Engines that are ready at once and take turns: bits, and the plugin's switch."""

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def write_random(directory: Path, bits: int, shape: str) -> Path:
    """A Llama of random codes, pack-quantized, all its linear layers but the head wNa8o8."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM, LlamaConfig

    from bytelane.checkpoint import QuantizedModule, QuantizedTensors, write_checkpoint
    from bytelane.packing import pack_rows
    from bytelane.scheme import Kind, LinearScheme, Storage, WeightScheme, code_range

    sizes = SHAPES[shape]
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"] // 4,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    generator = torch.Generator().manual_seed(0)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    low, high = code_range(bits)
    scheme = LinearScheme(WeightScheme(bits))
    quantized = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}

    def modules() -> Iterator[tuple[QuantizedModule, QuantizedTensors]]:
        for name in sorted(quantized):
            rows, columns = model.get_submodule(name).weight.shape
            codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)
            scale = torch.full((rows, 1), 2.0 / (columns**0.5 * 2**bits))
            tensors = QuantizedTensors(pack_rows(codes, bits), scale, torch.tensor(0.03), torch.tensor(0.03))
            yield QuantizedModule(name, Kind.LINEAR, (rows, columns), scheme, Storage.PACK_QUANTIZED), tensors

    def plain() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.state_dict().items():
            owner = name.rpartition(".")[0]
            if owner not in quantized:
                value = torch.randn(parameter.shape, generator=generator) * 0.02 + (1.0 if "norm" in owner else 0.0)
                yield name, value.to(torch.bfloat16)

    write_checkpoint(
        directory,
        config={**config.to_dict(), "architectures": ["LlamaForCausalLM"]},
        storage="compressed-tensors",
        modules=modules(),
        plain=plain(),
        kv_scales={},
        unquantized=["model.embed_tokens", "lm_head"],
    )
    return directory


def write_with_float_table(directory: Path, model: str) -> Path:
    """A copy of a checkpoint whose tables and weight-only head are bfloat16, which vLLM's own layers can run."""
    import torch

    from bytelane.checkpoint import write_checkpoint
    from bytelane.models import open_model
    from bytelane.packing import unpack_rows
    from bytelane.scheme import LinearScheme

    with open_model(model)[0] as source:
        integer = [m for m in source.modules.values() if isinstance(m.scheme, LinearScheme) and m.scheme.quantize_input]
        float_ones = [m for m in source.modules.values() if m not in integer]

        def plain() -> Iterator[tuple[str, torch.Tensor]]:
            yield from ((name, source.read_plain(name, copy=True)) for name in source.plain)
            for module in float_ones:
                tensors = source.read(module.name)
                codes = unpack_rows(tensors.rows, module.scheme.weight.num_bits, module.shape[1]).to(torch.float32)
                scale = tensors.weight_scale.to(torch.float32).repeat_interleave(
                    module.shape[1] // tensors.weight_scale.shape[1], 1
                )
                yield f"{module.name}.weight", (codes * scale).to(torch.bfloat16)

        write_checkpoint(
            directory,
            config={k: v for k, v in source.config.items() if k != "quantization_config"},
            storage="compressed-tensors",
            modules=((m, source.read(m.name, copy=True)) for m in integer),
            plain=plain(),
            kv_scales={},
            unquantized=[*(m.name for m in float_ones), "lm_head"],
        )
    return directory


@contextlib.contextmanager
def realtime(wanted: bool) -> Iterator[None]:
    """All threads of this process before everything that is not realtime."""

    def set_all(policy: int, priority: int) -> None:
        for thread in os.listdir("/proc/self/task") if wanted else ():
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    set_all(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        set_all(os.SCHED_OTHER, 0)


def worker(model: str, compiled: bool, prefill: int, before_all: bool) -> None:
    """One engine: says READY, then measures a round for each line it reads and prints milliseconds as JSON."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        max_model_len=prefill + DECODE + 32,
        max_num_seqs=8,
        dtype="bfloat16",
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
    )

    def seconds(prompts: int, length: int, tokens: int) -> float:
        inputs = [{"prompt_token_ids": [(7 * i + p) % 8000 + 3 for i in range(length)]} for p in range(prompts)]
        sampling = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(inputs, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def measured() -> dict[str, float]:
        found = {"prefill": seconds(1, prefill, 1) * 1e3}
        for batch in (1, 8):
            first = seconds(batch, 16, 1)
            found[f"decode {batch}"] = (seconds(batch, 16, DECODE + 1) - first) / DECODE * 1e3
        return found

    seconds(1, prefill, 2)
    seconds(8, 16, 2)
    print("READY", flush=True)
    for _ in sys.stdin:
        with realtime(before_all):
            found = measured()
        print("RESULT " + json.dumps(found), flush=True)


@dataclass
class Engine:
    """An engine's process."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    found: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, model: Path, switch: str, arguments: argparse.Namespace) -> Engine:
        """Begin to load a model; `switch` is the plugin's."""
        environment = os.environ | {
            "BYTELANE_VLLM": switch,
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [sys.executable, __file__, "--worker", str(model), "--prefill", str(arguments.prefill)]
        command += [f"--{flag}" for flag in ("eager", "realtime") if getattr(arguments, flag)]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (the engine's, for as long as it lives)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        return cls(name, subprocess.Popen(command, env=environment, text=True, **pipes), log)

    def wait(self, word: str) -> str:
        """The rest of the next line that begins with a word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        self.log.seek(0)
        sys.exit(f"{self.name} failed:\n{self.log.read()[-4000:]}")

    def measure(self) -> None:
        """One round."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        self.found.append(json.loads(self.wait("RESULT ")))

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@contextlib.contextmanager
def locked(file: Path | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if file is not None:
            fcntl.flock(stack.enter_context(file.open("a")), fcntl.LOCK_EX)
        yield


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint of 4-bit layers, instead of random ones")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the random Llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefilled prompt")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which `vllm serve` has on")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="lock this file while something is timed")
    parser.add_argument("--realtime", action="store_true", help="before other processes while something is timed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, not arguments.eager, arguments.prefill, arguments.realtime)
        return
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for group in GROUPS[:1] if arguments.model else GROUPS:
            (bits,) = {bits for bits, _ in group.values()}
            place = Path(folder) / f"w{bits}"
            model = (
                write_with_float_table(place, arguments.model)
                if arguments.model
                else write_random(place, bits, arguments.shape)
            )
            engines = []
            for name, (_, switch) in group.items():  # one after the other: starting takes all cores
                engines.append(Engine.start(name, model, switch, arguments))
                engines[-1].wait("READY")
            for _ in range(arguments.rounds):
                with locked(arguments.lock):
                    for engine in engines:
                        engine.measure()
            for engine in engines:
                engine.stop()
                medians[engine.name] = {k: statistics.median(r[k] for r in engine.found) for k in engine.found[0]}
    base = medians["vllm 4 bits"]
    for name, row in medians.items():
        cells = "  ".join(f"{k} {v:8.1f} ms ({base[k] / v:4.2f}x)" for k, v in row.items())
        print(f"{name:16} {cells}")
    ran = {"model": arguments.model or arguments.shape, "prefill_tokens": arguments.prefill}
    print(json.dumps({**ran, "compiled": not arguments.eager, "milliseconds": medians}))


if __name__ == "__main__":
    main()
