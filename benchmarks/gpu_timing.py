"""How the GPU benchmarks time: graph replays over rotated weights, and limits measured in the same run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bytelane.kernels import triton_configs as configs
from bytelane.kernels.triton_launch import Launch

COLD_BYTES = 256 << 20
"""Copies of a weight together: five times the 50 MB second-level cache of an H100."""


def copies_of(nbytes: int, *, least: int = 2, most: int = 512) -> int:
    """How many copies of a weight make every use of one cold."""
    return max(least, min(most, -(-COLD_BYTES // max(nbytes, 1))))


def graph_seconds(calls: list[Callable[[], object]], *, at_least: int = 20, replays: int = 7) -> float:
    """Seconds of one call: the calls in turn in one graph, the median over its replays.

    Args:
        calls: the same work on different copies of the weight.
        at_least: calls in the graph; the list is repeated whole until there are so many.
        replays: timed replays, after two that are not.
    """
    rounds = -(-at_least // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for replay in range(replays + 2):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end) * 1e-3 / (rounds * len(calls)))
    del graph
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy: the better of a kernel's and the copy engine's."""
    source = torch.randint(0, 255, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    calls = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    return max(2 * source.nbytes / graph_seconds([call], at_least=5) for call in calls)


@triton.jit
def nothing(x, PDL: triton.language.constexpr):
    """A kernel that only is one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def launch_seconds() -> dict[str, float]:
    """Seconds of an empty kernel in a graph of them, and of one that may begin while the one before still runs."""
    x = torch.zeros(16, device="cuda")
    overlaps = torch.cuda.get_device_capability() >= (9, 0)
    plain, overlapping = (Launch(nothing, (1, 1), (), {"PDL": pdl}, overlaps=pdl) for pdl in (False, overlaps))
    return {
        "launch_seconds": graph_seconds([lambda: plain(x)], at_least=200),
        "overlapping_launch_seconds": graph_seconds([lambda: overlapping(x)], at_least=200),
    }


def int8_rate() -> float:
    """Operations a second (two per multiply-add) of torch's int8 matmul on random data, at the best of some sizes."""
    rates = []
    for m, n, k in ((8192, 8192, 8192), (4096, 14336, 4096), (4096, 4096, 4096)):
        left = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda")
        right = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda").t()
        rates.append(2 * m * n * k / graph_seconds([lambda a=left, b=right: torch._int_mm(a, b)], at_least=5))
    return max(rates)


def random_rows(copies: int, out_features: int, row_bytes: int) -> list[Tensor]:
    """Random canonical rows, several times."""
    pool = torch.randint(0, 256, (copies, out_features, row_bytes), dtype=torch.uint8, device="cuda")
    return list(pool.unbind(0))


def tile_record(tile: configs.Tile) -> dict[str, Any]:
    """A tile for JSON."""
    return {"kind": type(tile).__name__, **dataclasses.asdict(tile)}


def recorded_tile(record: dict[str, Any]) -> configs.Tile:
    """The tile of a record."""
    tiles = (configs.DecodeTile, configs.FusedTile, configs.CodesTile, configs.RowsTile)
    kinds = {kind.__name__: kind for kind in tiles}
    return kinds[record["kind"]](**{name: value for name, value in record.items() if name != "kind"})
