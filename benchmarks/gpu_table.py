"""The README's GPU table from what `gpu_tune.py` measured.

    python benchmarks/gpu_table.py [benchmarks/results/gpu_tiles_h100.json] [--rows 1,256,4096]

Prints Markdown: of each shape and width the best tile's microseconds, and what they come to: gigabytes of weights a
second for few rows, tera-operations a second (two per multiply-add) for many.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu_tiles_h100.json"
FEW = 16
"""Up to so many rows the bytes of the weight are what counts."""


def row_bytes(in_features: int, bits: int) -> int:
    return -(-in_features * bits // 8)


def rate(r: dict[str, Any], seconds: float) -> str:
    if r["rows"] <= FEW:
        return f"{r['out'] * row_bytes(r['in'], r['bits']) / seconds / 1e9:.0f} GB/s"
    return f"{2 * r['rows'] * r['in'] * r['out'] / seconds / 1e12:.0f} TOP/s"


def table(measured: dict[str, Any], rows: set[int]) -> str:
    """The Markdown table of a file of results, of some numbers of rows."""
    widths = sorted({r["bits"] for r in measured["results"]})
    cells = {(r["in"], r["out"], r["rows"], r["bits"]): r for r in measured["results"]}
    lines = ["| in x out | M | " + " | ".join(f"{b} bits" for b in widths) + " |", "| --- " * (2 + len(widths)) + "|"]
    for k, n, m in sorted({key[:3] for key in cells if key[2] in rows}):
        found = (cells.get((k, n, m, bits)) for bits in widths)
        texts = ("" if r is None else f"{r['seconds'] * 1e6:.1f} us, {rate(r, r['seconds'])}" for r in found)
        lines.append(f"| {k} x {n} | {m} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--rows", default="1,256,4096", help="numbers of activation rows (M), with commas")
    args = parser.parse_args()
    print(table(json.loads(args.results.read_text()), {int(m) for m in args.rows.split(",")}))


if __name__ == "__main__":
    main()
