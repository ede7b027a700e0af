"""What this machine can do at best: read bandwidth, and the rate of exact int8 dots.

    python benchmarks/limits.py [--quick] [--threads 1,2]

- Read bandwidth: the fastest of torch's own reductions over a buffer far larger than the caches, best of several. A
  weight that is read once cannot be used faster than this.
- Dot rate: `accumulate` on a problem that stays in the caches, best of several, on one thread, times the threads (they
  share nothing). It is measured with the kernels themselves, so it says what memory and threads cost them, not how far
  they are from the processor's peak.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from bytelane.kernels import cpu

BUFFER_BYTES = 256 << 20
QUICK_BUFFER_BYTES = 96 << 20


def best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def read_bandwidth(threads: int, *, quick: bool = False) -> float:
    """Bytes per second of reading a large buffer."""
    torch.set_num_threads(threads)
    size = QUICK_BUFFER_BYTES if quick else BUFFER_BYTES
    words = torch.arange(size // 8, dtype=torch.int64)
    repeats = 3 if quick else 9
    calls = (words.sum, words.view(torch.float32).amax, words.view(torch.float64).sum)
    return size / min(best(call, repeats) for call in calls)


def dot_rate(threads: int, isa: str, num_bits: int, *, quick: bool = False) -> float:
    """Multiply-adds per second of a matmul whose operands stay in the caches."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    m, n, k = 64, 64, 1024
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    rows = torch.randint(0, 256, (n, k * num_bits // 8), dtype=torch.uint8)
    fastest = best(lambda: cpu.accumulate(q, rows, num_bits, isa=isa, path="packed"), 20 if quick else 200)
    torch.set_num_threads(before)
    return threads * m * n * k / fastest


def measure(threads: list[int], isas: tuple[str, ...], *, quick: bool) -> dict[str, object]:
    """All limits: bandwidth by thread count, dot rate by thread count, instruction set and width."""
    return {
        "bandwidth": {t: read_bandwidth(t, quick=quick) for t in threads},
        "dot_rate": {
            t: {isa: {bits: dot_rate(t, isa, bits, quick=quick) for bits in cpu.PACKED_BITS} for isa in isas}
            for t in threads
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run that only shows that it works")
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}", help="thread counts, with commas")
    args = parser.parse_args()
    threads = sorted({int(t) for t in args.threads.split(",")})
    limits = measure(threads, cpu.supported_isas(), quick=args.quick)
    table = Table("threads", "read GB/s", "isa", *(f"{bits}-bit GMAC/s" for bits in cpu.PACKED_BITS), title="limits")
    for t in threads:
        for isa, rates in limits["dot_rate"][t].items():
            table.add_row(
                str(t), f"{limits['bandwidth'][t] / 1e9:.1f}", isa, *(f"{r / 1e9:.0f}" for r in rates.values())
            )
    Console(width=120).print(table)
    print(json.dumps(limits))


if __name__ == "__main__":
    main()
