"""What this machine can do at best: read bandwidth, and the rate of exact int8 dots.

    python benchmarks/limits.py [--quick] [--threads 1,2]

- Read bandwidth: every byte of a buffer far larger than the caches, best of several. A weight that is read once cannot
  be used faster than this.
- Dot rate: the widest tile of the kernels on operands that stay in the first-level cache, best of several.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from bytelane import benchmark
from bytelane.kernels import cpu


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading a large buffer."""
    torch.set_num_threads(threads)
    return benchmark.read_bandwidth(cpu.supported_isas()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run that only shows that it works")
    parser.add_argument("--threads", default=f"1,{torch.get_num_threads()}", help="thread counts, with commas")
    args = parser.parse_args()
    table = Table("threads", "isa", "read GB/s", *(f"{bits}-bit GMAC/s" for bits in cpu.PACKED_BITS), title="limits")
    found = []
    for threads in sorted({int(t) for t in args.threads.split(",")}):
        torch.set_num_threads(threads)
        for isa in cpu.supported_isas():
            limits = benchmark.measure_limits(isa, cpu.PACKED_BITS, quick=args.quick)
            found.append(asdict(limits))
            rates = (f"{rate / 1e9:.0f}" for rate in limits.dot_rate.values())
            table.add_row(str(threads), isa, f"{limits.bandwidth / 1e9:.1f}", *rates)
    Console(width=120).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
