"""The README's GPU tables from what `gpu_linear.py` measured.

    python benchmarks/gpu_table.py [benchmarks/results/gpu_linear_h100.json] [--rows 1,16,256,4096]
    python benchmarks/gpu_table.py benchmarks/results/gpu_peers_h100.json

Prints Markdown. Of a run without peers: each shape's and width's microseconds, and the percent of the limit (the bytes
over the copy's bandwidth, or the operations over the rate of torch's int8 matmul, whichever takes longer) measured in
the same run. Of a run with peers: how many times as long each peer took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu_linear_h100.json"
PEERS = ("emulated", "humming", "bf16")


def percent(r: dict[str, Any]) -> str:
    return f"{100 * r['limit_seconds'] / r['seconds']['bytelane']:.0f}"


def microseconds(r: dict[str, Any]) -> str:
    return f"{r['seconds']['bytelane'] * 1e6:.1f}"


def lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def alone(measured: dict[str, Any], rows: set[int]) -> str:
    """Microseconds and percent of the limit, the widths side by side."""
    widths = sorted({r["bits"] for r in measured["results"]})
    cells = {(r["in"], r["out"], r["m"], r["bits"]): r for r in measured["results"]}
    made = []
    for k, n, m in sorted({key[:3] for key in cells if key[2] in rows}):
        found = (cells.get((k, n, m, bits)) for bits in widths)
        made.append([f"{k} x {n}", str(m), *("" if r is None else f"{microseconds(r)}, {percent(r)} %" for r in found)])
    return lines(["in x out", "M", *(f"{bits} bits: us, of the limit" for bits in widths)], made)


def beside_peers(measured: dict[str, Any], rows: set[int]) -> str:
    """Microseconds, percent of the limit, and each peer's time over bytelane's."""
    present = [p for p in PEERS if any(p in r["seconds"] for r in measured["results"])]
    made = []
    for r in measured["results"]:
        if r["m"] in rows:
            ratios = (r["seconds"][p] / r["seconds"]["bytelane"] if p in r["seconds"] else None for p in present)
            texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            made.append(
                [f"{r['in']} x {r['out']}", str(r["bits"]), str(r["m"]), microseconds(r), f"{percent(r)} %", *texts]
            )
    return lines(["in x out", "bits", "M", "us", "of the limit", *(f"{p} takes" for p in present)], made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--rows", default="1,16,256,4096", help="numbers of activation rows (M), with commas")
    args = parser.parse_args()
    measured, rows = json.loads(args.results.read_text()), {int(m) for m in args.rows.split(",")}
    peers = any(p in r["seconds"] for r in measured["results"] for p in PEERS)
    print(beside_peers(measured, rows) if peers else alone(measured, rows))


if __name__ == "__main__":
    main()
