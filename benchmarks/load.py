"""How fast a checkpoint's linear layers are ready, beside what this machine's memory allows.

    python benchmarks/load.py MODEL [--rounds 3] [--threads 2] [--group-size 32]

A layer is ready when its first token could be computed: codes read from the file (which the page cache holds after the
first round) into memory of their own, checked, and what depends on no activation computed (the scales of groups; codes
are used as they lie). Rates are bytes of the file a second, medians over the rounds.

- *read bandwidth* is that of `bytelane bench linear`: reading memory, the limit of decoding.
- *fresh copy* is the limit of loading: bytes copied into memory that the system has to hand out and clear first, with
  the same threads. It moves every byte at least four times: cleared, read from the page cache, written, and fetched to
  be written.

`--group-size` adds a 4-bit layer of 4096 x 14336 with such groups, made in memory, and what computing its scales costs.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from rich.console import Console
from rich.table import Table

import bytelane
from bytelane import benchmark
from bytelane.dispatch import machine
from bytelane.kernels import cpu
from bytelane.memory import streamed_empty
from bytelane.models import build_linear, open_model
from bytelane.scheme import Kind

FRESH_BYTES = 256 << 20


def fresh_copy() -> float:
    """Bytes a second of copying into new memory, with torch's threads."""
    source = streamed_empty((FRESH_BYTES,), torch.uint8).fill_(1)
    threads = torch.get_num_threads()

    def run() -> None:
        target = streamed_empty((FRESH_BYTES,), torch.uint8)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda pair: pair[0].numpy().__setitem__(..., pair[1].numpy()), parts(target)))

    def parts(target: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(target.chunk(threads), source.chunk(threads), strict=True))

    return FRESH_BYTES / statistics.median(benchmark.seconds(run) for _ in range(3))


def ready(model: str) -> tuple[int, float]:
    """The bytes of a checkpoint's linear layers, and the seconds until all of them are ready."""
    checkpoint, skeleton = open_model(model)
    x, kept = {}, []  # all layers at once, as in a model: memory that one gives back is faster than new memory
    total, spent = 0, 0.0
    with checkpoint, torch.inference_mode():
        for name, module in checkpoint.modules.items():
            if module.kind is not Kind.LINEAR:
                continue
            k = module.shape[1]
            row = x.setdefault(k, torch.zeros(0, k, dtype=skeleton.dtype))
            start = time.perf_counter()
            tensors = checkpoint.read(name, copy=True)
            layer = build_linear(module, tensors)
            layer(row)  # no rows: nothing is multiplied
            spent += time.perf_counter() - start
            kept.append(layer)
            total += checkpoint.stored_bytes(name)
    return total, spent


def group_scales(group_size: int) -> float:
    """Bytes of scales a second that are computed, of a large layer."""
    k, n = 4096, 14336
    scale = streamed_empty((n, k // group_size), torch.float32).fill_(0.01)
    isa = machine().isas[0]
    s_in, s_out = torch.tensor(0.02), torch.tensor(0.05)
    return scale.nbytes / statistics.median(
        benchmark.seconds(lambda: cpu.group_scales(scale, s_in, s_out, isa=isa)) for _ in range(9)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; one more comes first and fills the page cache")
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    parser.add_argument("--group-size", type=int, default=32, help="inputs a scale of the layer made in memory")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    read, copy = benchmark.read_bandwidth(machine().isas[0]), fresh_copy()
    ready(args.model)
    rates, total = [], 0
    for _ in range(args.rounds):
        total, spent = ready(args.model)
        rates.append(total / spent)
    whole = []
    for _ in range(args.rounds):
        whole.append(benchmark.seconds(lambda: bytelane.load_model(args.model)))
    scales = group_scales(args.group_size)
    layers, model = statistics.median(rates), statistics.median(whole)
    table = Table("", "GB/s", "% of read bandwidth", "% of fresh copy")
    for name, rate in (
        ("read bandwidth", read),
        ("fresh copy", copy),
        ("linear layers, file to ready", layers),
        (f"scales of groups of {args.group_size}, computed", scales),
    ):
        table.add_row(name, f"{rate / 1e9:.1f}", f"{100 * rate / read:.0f}", f"{100 * rate / copy:.0f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{total / 1e6:.0f} MB of linear layers; load_model as a whole {model:.2f} s")
    print(
        json.dumps(
            {
                **benchmark.describe(),
                "read_bandwidth": read,
                "fresh_copy": copy,
                "linear_bytes": total,
                "linear_rate": layers,
                "group_size": args.group_size,
                "group_scales_rate": scales,
                "load_model_seconds": model,
            }
        )
    )


if __name__ == "__main__":
    main()
