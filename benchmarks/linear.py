"""One integer linear layer beside torch's bfloat16 `F.linear`, in the same run, with cold weights.

    python benchmarks/linear.py [--quick] [--threads 2] [--isa avx2] [--shapes 1536x6144] [--rows 1,16,128]

Each round runs bfloat16 and every width once, starting with another of them each time, so that all of them see the
same machine; the table has medians. `ratio` is the median over the rounds of the bfloat16 time over ours in that round,
with its quartiles: on a machine that others use the times move together and the ratio moves less. Every call takes the
next of enough copies of the weight that no cache holds one until its turn comes again. The limit of a call is the
slower of reading its weights at the bandwidth of a torch sum, measured in the same rounds, and doing its dots at the
rate measured in cache (see limits.py). The load of the machine before and after says how far to trust a run.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bytelane.kernels import cpu
from bytelane.scheme import row_bytes
from limits import dot_rate

SHAPES = "1536x6144,1536x12288,6144x1536,2560x10240,4096x14336"
QUICK_SHAPES = "1536x6144"
COLD_BYTES = 96 << 20
"""All copies of a weight together; three times the largest cache this was written on."""

WIDTHS = cpu.PACKED_BITS


def copies(pool: Tensor, shape: tuple[int, int]) -> Iterator[Tensor]:
    """Views of one pool of memory, each a weight of its own, over and over."""
    size = shape[0] * shape[1]
    return cycle([pool[i * size : (i + 1) * size].view(shape) for i in range(pool.numel() // size)])


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def wrapper_overhead(isa: str) -> float:
    """Seconds of a call that has next to nothing to compute."""
    scale, x, rows = torch.tensor(0.1), torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.uint8)
    weight_scale = torch.full((4, 1), 0.1)
    times = [
        seconds(lambda: cpu.linear(x, rows, weight_scale, scale, scale, None, 4, isa=isa, path="packed"))
        for _ in range(2000)
    ]
    return statistics.median(times)


def run_shape(k: int, n: int, m: int, isa: str, rounds: int, pool: Tensor) -> dict[str, list[float]]:
    """Seconds of every round of reading the pool once (`read`), of `bf16`, and of every width for one shape."""
    x = torch.randn(m, k).to(torch.bfloat16)
    weight_scale, scale = torch.full((n, 1), 0.01), torch.tensor(0.02)
    dense = copies(pool, (n, k))
    calls: dict[str, Callable[[], object]] = {
        "read": pool.view(torch.int64).sum,
        "bf16": lambda: torch.nn.functional.linear(x, next(dense)),
    }
    for bits in WIDTHS:
        packed = copies(pool.view(torch.uint8), (n, row_bytes(k, bits)))
        calls[f"w{bits}"] = lambda bits=bits, packed=packed: cpu.linear(
            x, next(packed), weight_scale, scale, scale, None, bits, isa=isa, path="packed"
        )
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds + 1):
        for name in order:
            times[name].append(seconds(calls[name]))
        order.append(order.pop(0))
    return {name: values[1:] for name, values in times.items()}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds: only shows that it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=cpu.supported_isas()[0], choices=cpu.supported_isas())
    parser.add_argument("--shapes", default=None, help="INxOUT, with commas")
    parser.add_argument("--rows", default=None, help="numbers of activation rows (M), with commas")
    return parser.parse_args()


def main() -> None:
    args = parse()
    named = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    shapes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in named.split(","))]
    rows = [int(m) for m in (args.rows or ("1,16" if args.quick else "1,16,128")).split(",")]

    load_before = os.getloadavg()[0]
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rates = {bits: dot_rate(args.threads, args.isa, bits, quick=args.quick) for bits in WIDTHS}
    overhead = wrapper_overhead(args.isa)
    pool = torch.randn(max(COLD_BYTES // 2, *(k * n for k, n in shapes))).to(torch.bfloat16)
    table = Table("in x out", "M", "weights", "median us", "GB/s", "read GB/s", "GMAC/s", "% of limit", "ratio to bf16")
    table.title = f"{args.isa}, {args.threads} threads, call overhead {overhead * 1e6:.1f} us"
    results = []
    for k, n in shapes:
        for m in rows:
            rounds = 3 if args.quick else 41 if m == 1 else 11 if m <= 16 else 5
            times = run_shape(k, n, m, args.isa, rounds, pool)
            bandwidth = pool.numel() * 2 / statistics.median(times.pop("read"))
            for name, values in times.items():
                spent = statistics.median(values)
                low, ratio, high = quartiles([b / v for b, v in zip(times["bf16"], values, strict=True)])
                bits = 16 if name == "bf16" else int(name[1:])
                size, dots = n * row_bytes(k, bits), m * n * k
                limit = max(size / bandwidth, dots / rates[bits] if bits in rates else 0.0)
                result = {"in": k, "out": n, "m": m, "weights": name, "seconds": spent, "bandwidth": bandwidth}
                results.append(
                    result
                    | {"fastest": min(values), "limit_seconds": limit, "ratio": ratio, "ratio_quartiles": [low, high]}
                )
                table.add_row(
                    f"{k}x{n}",
                    str(m),
                    name,
                    f"{spent * 1e6:.0f}",
                    f"{size / spent / 1e9:.1f}",
                    f"{bandwidth / 1e9:.1f}",
                    f"{dots / spent / 1e9:.1f}",
                    f"{100 * limit / spent:.0f}" if bits in rates or m == 1 else "",
                    f"{ratio:.1f} ({low:.1f}-{high:.1f})",
                    end_section=bits == WIDTHS[-1],
                )
    Console(width=120).print(table)
    loads = [load_before, os.getloadavg()[0]]
    print(f"load before and after: {loads[0]:.1f}, {loads[1]:.1f}; this run alone makes {args.threads}")
    summary = {"isa": args.isa, "threads": args.threads, "dot_rate": rates, "call_overhead_seconds": overhead}
    summary |= {"load": loads}
    print(json.dumps(summary | {"results": results}))


if __name__ == "__main__":
    main()
