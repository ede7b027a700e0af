"""Try tiles of the Triton kernels on this GPU: what the table in `bytelane/kernels/triton_configs.py` is made from.

    python benchmarks/gpu_tune.py [--bits 2,4,8] [--shapes 1536x12288,4096x14336] [--rows 1,16,256,4096] [--json FILE]

Candidates are compiled side by side first (Triton keeps them on disk), then timed one after another as
`gpu_linear.py` times. The table shows the best few of each problem.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from bytelane.kernels import cuda
from bytelane.kernels.triton_codes import planes
from bytelane.kernels.triton_configs import (
    CodesTile,
    DecodeTile,
    FusedTile,
    RowsTile,
    Tile,
    decodable,
    last_wave_parts,
    linear_tile,
    power_of_two,
    straight,
)
from bytelane.scheme import row_bytes
from gpu_linear import environment
from gpu_timing import copies_of, graph_seconds, random_rows, tile_record


def decode_candidates(bits: int, rows: int, out_features: int, in_features: int) -> list[Tile]:
    """Warps that share a step of K among some of them, with so many rows of the weight in each."""
    words = in_features * bits // 32
    found: list[Tile] = []
    for (warps, across), each in itertools.product(((4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 8)), (4, 8)):
        bn, bw = each * warps // across, 128 * across
        fits = bw <= max(128, power_of_two(words)) and 132 <= out_features // bn <= 1100
        if fits and (rows == 1 or (warps == 4 and each == 4)):
            found.append(DecodeTile(bn, bw, warps))
    return found


def fused_candidates(bits: int, rows: int, out_features: int, in_features: int) -> list[Tile]:
    """What the table takes on tensor cores, and its like with other steps, stages and warps."""
    table = linear_tile("sm90", rows, out_features, in_features, bits, 0, 1)
    wide = [FusedTile(64, 128, 1, 4, 5), FusedTile(64, 256, 1, 4, 3), FusedTile(64, 128, 1, 4, 3)]
    split = [FusedTile(16, 512, 4, 4, 4), FusedTile(16, 1024, 8, 8, 4), FusedTile(32, 512, 8, 8, 3)]
    return list(dict.fromkeys([table, *(split if out_features < 4096 else wide)]))


def rows_candidates(out_features: int) -> list[Tile]:
    """Depths of what is on its way; long rows in parts. Beginning early is not always better."""
    if out_features < 4096:
        return [RowsTile(64, 4, 3, 8, ask=True), RowsTile(64, 4, 6, 8), RowsTile(64, 4, 4, 6, ask=True)]
    depths = (RowsTile(128, 8, 4), RowsTile(128, 8, 6), RowsTile(64, 4, 8))
    return [dataclasses.replace(tile, early=early) for tile in depths for early in (True, False)]


def codes_candidates(bits: int, rows: int, out_features: int, in_features: int) -> list[Tile]:
    if rows > 256:
        return large_candidates(bits, rows, out_features)
    shapes = [(64, max(16, min(64, rows)))] if rows <= 64 else [(64, 64), (128, 64), (128, 128)]
    sharing = (1, 2, 3, 4, 5, 6, 8) if rows <= 64 else (1, 2, 3)
    shared_k = [s for s in sharing if s == 1 or in_features // s >= 1024]
    found: list[Tile] = []
    for (bn, bm), bb, warps, stages, splits in itertools.product(
        shapes, (64, 128), (4, 8), (3, 4) if rows > 16 else (4,), shared_k
    ):
        tiles = -(-out_features // bn) * -(-rows // bm)
        wanted = splits == 1 or tiles * splits <= 132 * 3
        fits = stage_bytes(bits, bn, bm, bb) * stages <= SHARED and bn * bm // (warps * 32) <= 128
        if wanted and fits and (warps == 4 or bn * bm > 8192):
            found.append(CodesTile(bn, bm, bb, 8, warps, stages, splits))
    return found


SHARED = 220 << 10
"""Bytes of shared memory that a program may plan with."""


def stage_bytes(bits: int, bn: int, bm: int, bb: int) -> int:
    return bn * bb + bm * bb * planes(bits)


def large_candidates(bits: int, rows: int, out_features: int) -> list[Tile]:
    """For many rows: with every tile whole, and with what is left after whole waves shared out."""
    shapes = ((128, 128, 4), (128, 128, 8), (128, 64, 4), (128, 64, 8), (256, 64, 8), (128, 256, 8), (64, 256, 4))
    found: list[Tile] = []
    for (bn, bm, warps), bb, stages in itertools.product(shapes, (128,) if bits == 8 else (64, 128), (3, 4)):
        stage = stage_bytes(bits, bn, bm, bb) * stages
        if stage > SHARED:
            continue
        whole = CodesTile(bn, bm, bb, 8, warps, stages)
        found.append(whole)
        # programs at once on a multiprocessor, by shared memory and by sums in registers beside some 80 others
        together = min(SHARED // stage, 65536 // (32 * warps * (bn * bm // (32 * warps) + 80)))
        for wave in {132 * together, 132 * min(together, 2)}:
            parts = last_wave_parts(-(-out_features // bn) * -(-rows // bm), wave)
            if parts > 1:
                found.append(dataclasses.replace(whole, splits=parts, wave=wave))
    return found


def candidates(bits: int, rows: int, out_features: int, in_features: int) -> list[Tile]:
    fused = fused_candidates(bits, rows, out_features, in_features) if rows <= cuda.FUSED_ROWS else []
    if rows > 1 and straight(rows, in_features, bits, 0):
        fused += rows_candidates(out_features)
    if decodable(rows, in_features, bits, 0):
        return [*decode_candidates(bits, rows, out_features, in_features), *fused]
    return fused + (codes_candidates(bits, rows, out_features, in_features) if rows > 4 else [])


def call(tile: Tile, x: torch.Tensor, weight: torch.Tensor, scales: tuple[Any, ...], bits: int) -> torch.Tensor:
    return cuda.linear(x, weight, *scales, None, bits, tile=tile)


def sides(out_features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.rand(out_features, 1, device="cuda") * 0.02,
        torch.tensor(0.02, device="cuda"),
        torch.tensor(0.5, device="cuda"),
    )


Job = tuple[Tile, int, int, int, int]


def job_of(tile: Tile, bits: int, rows: int, in_features: int, out_features: int) -> Job:
    """What decides the code: `(tile, bits, rows, K, N)`, of which tiles of many rows care for the first two."""
    if isinstance(tile, CodesTile):
        return dataclasses.replace(tile, wave=0), bits, tile.bm, 12288, 512
    return tile, bits, power_of_two(rows), in_features, out_features


def compile_one(job: Job) -> str | None:
    """Compile a candidate, by running it once."""
    tile, bits, rows, k, n = job
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    try:
        call(tile, x, random_rows(1, n, row_bytes(k, bits))[0], sides(n), bits)
    except Exception as error:  # noqa: BLE001  (a candidate that does not compile or fit is reported, not timed)
        return f"{tile}: {type(error).__name__} {str(error)[:100]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--shapes", default="1536x12288,12288x1536,2560x10240,4096x14336")
    parser.add_argument("--rows", default="1,4,16,64,256,1024,4096")
    parser.add_argument("--problems", help="BITS:ROWS, with commas, instead of all pairs of --bits and --rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: it is done already")
    parser.add_argument("--only-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other problem after so long")
    args = parser.parse_args()
    begun = time.monotonic()
    shapes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in args.shapes.split(","))]
    pairs = list(itertools.product(args.bits.split(","), args.rows.split(",")))
    if args.problems:
        pairs = [tuple(pair.split(":")) for pair in args.problems.split(",")]
    problems = [(int(bits), shape, int(m)) for bits, m in pairs for shape in shapes]
    jobs = list(
        dict.fromkeys(job_of(tile, bits, m, k, n) for bits, (k, n), m in problems for tile in candidates(bits, m, n, k))
    )
    failed = set()
    if args.workers:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            for job, error in zip(jobs, pool.map(compile_one, jobs, chunksize=2), strict=True):
                if error:
                    failed.add(job)
                    print(error, file=sys.stderr)
        print(f"{len(jobs)} candidates compiled, {len(failed)} failed", flush=True)
    if args.only_compile:
        return
    results = []
    for bits, (k, n), m in problems:
        if time.monotonic() - begun > args.seconds:
            print("no time left", flush=True)
            break
        weights = random_rows(copies_of(n * row_bytes(k, bits)), n, row_bytes(k, bits))
        scales, x = sides(n), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        timed = []
        for tile in candidates(bits, m, n, k):
            if job_of(tile, bits, m, k, n) in failed:
                continue
            calls = [functools.partial(call, tile, x, w, scales, bits) for w in weights]
            try:
                timed.append((graph_seconds(calls, at_least=1, replays=5), tile))
            except triton.OutOfResources:
                print(f"{tile} does not fit", file=sys.stderr)
        timed.sort(key=lambda pair: pair[0])
        results.append({"bits": bits, "in": k, "out": n, "rows": m, "best": [(s, tile_record(t)) for s, t in timed]})
        rate = 2 * m * n * k / timed[0][0] / 1e12
        speed = n * row_bytes(k, bits) / timed[0][0] / 1e9
        print(f"{bits} bits {k}x{n} M={m}: {speed:.0f} GB/s {rate:.0f} TOP/s", flush=True)
        for seconds, tile in timed[:3]:
            print(f"    {seconds * 1e6:8.2f} us  {tile}", flush=True)
        if args.json:
            lines = ",\n".join(json.dumps(r) for r in results)
            args.json.write_text(json.dumps(environment())[:-1] + f', "results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
