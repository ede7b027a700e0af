"""One integer linear layer on the GPU beside bfloat16, the emulation and humming, in one run, with cold weights.

    python benchmarks/gpu_linear.py [--shapes 1536x12288,...] [--bits 2,4,8] [--rows 1,4,16,64,...] [--no-peers]

Every time is the median of graph replays; a graph runs the layer over enough copies of its weight that no use finds one
in the second-level cache. Limits are measured in the same run: a large copy's bandwidth, and torch's own int8 matmul.
`% of limit` is the slower of the weight's bytes over the bandwidth (and x and y once) and the operations over the rate,
over the time. The kernels of a shape are compiled side by side
first; humming's take minutes. An empty kernel's time in such a graph, plain and overlapping the one before as
bytelane's do, is the least any launch costs. Results go to `benchmarks/results/gpu_linear.json`, from which
`benchmarks/gpu_table.py` makes the README's table; the last line of stdout is a summary in JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import bytelane
import gpu_peers
from bytelane.dispatch import select
from bytelane.kernels.triton_configs import Tile, device_class, linear_tile
from bytelane.scheme import row_bytes
from gpu_timing import (
    copies_of,
    copy_bandwidth,
    graph_seconds,
    int8_rate,
    launch_seconds,
    random_rows,
    recorded_tile,
    tile_record,
)

SHAPES = "1536x12288,12288x1536,2560x10240,4096x14336"
ROWS = "1,4,16,64,256,1024,4096"
RESULTS = Path(__file__).parent / "results" / "gpu_linear.json"


PEERS = ("emulated", "humming", "bf16")


def our_calls(
    x: torch.Tensor, out_features: int, bits: int, tile: Tile | None = None, *, few: bool = False
) -> gpu_peers.Calls:
    m, k = x.shape
    count = 1 if few else copies_of(out_features * row_bytes(k, bits))
    weights = random_rows(count, out_features, row_bytes(k, bits))
    scale = torch.rand(out_features, 1, device="cuda") * 0.02
    s_in, s_out = torch.tensor(0.02, device="cuda"), torch.tensor(0.5, device="cuda")
    kernel = select("linear", "cuda", x.dtype, bits, 0, m)
    given = {} if tile is None else {"tile": tile}
    return [lambda w=w: kernel.run(x, w, scale, s_in, s_out, None, bits, 0, **given) for w in weights]


Best = dict[tuple[int, int, int, int], Tile]


def best_tiles(files: list[Path]) -> Best:
    """The fastest tile of each (K, N, M, bits) in files of `gpu_tune.py`."""
    found = [r for file in files for r in json.loads(file.read_text())["results"]]
    return {(r["in"], r["out"], r["rows"], r["bits"]): recorded_tile(r["best"][0][1]) for r in found}


def tile_of(best: Best, k: int, n: int, m: int, bits: int) -> Tile:
    """The tile a problem is timed with: a tuned one, or the table's."""
    chosen = linear_tile(device_class(torch.device("cuda")), m, n, k, bits, 0)
    return best.get((k, n, m, bits), chosen)


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def environment() -> dict[str, Any]:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    packages = ("torch", "triton", "transformers", "humming-kernels")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **(gpu() if torch.cuda.is_available() else {"device": "none"}),
        "versions": {"bytelane": bytelane.__version__, **{p: installed[p] for p in packages if p in installed}},
    }


def warm(problem: tuple[int, int, int, int, bool, Tile]) -> str | None:
    """Run everything of a problem once, so that it is compiled and on disk; what a peer raised, if it did."""
    k, n, m, bits, peers, tile = problem
    x = torch.randn(m, k, device="cuda").bfloat16()
    our_calls(x, n, bits, tile, few=True)[0]()
    failure = None
    if peers:
        try:
            for calls in gpu_peers.humming_calls(x, n, bits, few=True).values():
                calls[0]()
        except Exception as error:  # noqa: BLE001  (another project's; reported, and its times are left out)
            failure = f"{k}x{n}, {bits} bits, M = {m}: {type(error).__name__} {str(error)[:200]}"
    torch.cuda.synchronize()
    return failure


def measure(
    k: int, n: int, m: int, bits: int, limits: dict[str, float], bf16: float | None, humming: bool, tile: Tile
) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda").bfloat16()
    times = {"bytelane": graph_seconds(our_calls(x, n, bits, tile))}
    if bf16 is not None:
        times["bf16"] = bf16
    if humming:
        for name, calls in gpu_peers.humming_calls(x, n, bits).items():
            times[name] = graph_seconds(calls)
    moved = (n * row_bytes(k, bits) + 2 * m * (k + n)) / limits["copy_bytes_per_second"]
    limit = max(moved, 2 * m * n * k / limits["int8_operations_per_second"])
    found = {"in": k, "out": n, "m": m, "bits": bits, "seconds": times, "limit_seconds": limit}
    return found | {"tile": tile_record(tile)}


def table_row(r: dict[str, Any]) -> list[str]:
    k, n, m, bits, times = r["in"], r["out"], r["m"], r["bits"], r["seconds"]
    spent = times["bytelane"]
    ratios = [f"{times[p] / spent:.2f}" if p in times else "" for p in PEERS]
    figures = [
        f"{spent * 1e6:.2f}",
        f"{n * row_bytes(k, bits) / spent / 1e9:.0f}",
        f"{2 * m * n * k / spent / 1e12:.0f}",
    ]
    return [f"{k}x{n}", str(bits), str(m), *figures, f"{100 * r['limit_seconds'] / spent:.0f}", *ratios]


def summarize(limits: dict[str, float], results: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = dict(limits)
    for peer in PEERS:
        ratios = [r["seconds"][peer] / r["seconds"]["bytelane"] for r in results if peer in r["seconds"]]
        if ratios:
            summary[peer] = {"geometric_mean": statistics.geometric_mean(ratios), "least": min(ratios)}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="INxOUT, with commas")
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--rows", default=ROWS, help="numbers of activation rows (M), with commas")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile; 0: it is done already")
    parser.add_argument("--only-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other shape after so long")
    parser.add_argument("--tiles", type=Path, nargs="*", default=[], help="JSON of gpu_tune.py: its best tiles")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    begun = time.monotonic()
    shapes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in args.shapes.split(","))]
    rows, widths = [int(m) for m in args.rows.split(",")], [int(b) for b in args.bits.split(",")]
    peers, best = not args.no_peers, best_tiles(args.tiles)
    torch.manual_seed(0)
    limits = (
        {}
        if args.only_compile
        else {"copy_bytes_per_second": copy_bandwidth(), "int8_operations_per_second": int8_rate(), **launch_seconds()}
    )
    table = Table("in x out", "bits", "M", "us", "GB/s", "TOP/s", "% of limit", *PEERS)
    table.title = ", ".join(f"{name} {value:.3g}" for name, value in limits.items())
    results: list[dict[str, Any]] = []
    args.json.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(args.workers, 1), mp_context=context) as pool:
        for k, n in shapes:
            if time.monotonic() - begun > args.seconds:
                print(f"no time left for {k}x{n} and what comes after it", flush=True)
                break
            # compiled side by side first, and timed with nothing else running
            problems = [(m, bits) for bits, m in itertools.product(widths, rows)]
            tiles = {(m, bits): tile_of(best, k, n, m, bits) for m, bits in problems}
            jobs = [(k, n, m, bits, peers and gpu_peers.available(), tiles[m, bits]) for m, bits in problems]
            asked = pool.map(warm, jobs) if args.workers else map(warm, jobs)
            failures = dict(zip(problems, asked, strict=True))
            for failure in filter(None, failures.values()):
                print(f"humming: {failure}", flush=True)
            if args.only_compile:
                continue
            bf16: dict[int, float] = {}
            for bits, m in itertools.product(widths, rows):  # a peer's layer serves all rows of a width
                x = torch.randn(m, k, device="cuda").bfloat16()
                if peers and m not in bf16:
                    bf16[m] = graph_seconds(gpu_peers.bf16_calls(x, n))
                humming = peers and gpu_peers.available() and failures[m, bits] is None
                results.append(measure(k, n, m, bits, limits, bf16.get(m), humming, tiles[m, bits]))
                table.add_row(*table_row(results[-1]))
                torch.cuda.empty_cache()
                found = {**environment(), "limits": limits, "results": results}
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.only_compile:
        return
    Console(width=120).print(table)
    print(json.dumps(summarize(limits, results)))


if __name__ == "__main__":
    main()
