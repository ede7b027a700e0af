"""One integer linear layer beside the machine's limits and its peers, all in one run.

Every result is a ratio inside the run. Rounds go through all contenders, starting with another of them each time, so
that all see the same machine. Weights rotate through enough copies that no cache holds one until its turn comes again.
The limit of a layer is the slower of

    read    its packed bytes over the bandwidth of reading memory, measured in the same rounds
    dot     its multiply-adds over the rate of the widest tile on operands that stay in the first-level cache

Peers that are installed run beside it: torch's bfloat16 `linear`; oneDNN's int8 linear through torch, which gives the
same integers; XNNPACK through ai-edge-litert, the phone's runtime (2, 4 and 8 bits).
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelane.dispatch import machine, select
from bytelane.kernels import cpu
from bytelane.memory import streamed_empty
from bytelane.scheme import row_bytes

COLD_BYTES = 128 << 20
"""All copies of a weight together: four times the last-level cache this was written on."""

READ_BYTES = 32 << 20

PEERS = ("bfloat16", "onednn", "xnnpack")


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best with `threads` threads: bytes and multiply-adds a second, by width."""

    isa: str
    threads: int
    bandwidth: float
    dot_rate: dict[int, float]


@dataclass(frozen=True)
class Result:
    """One layer: `in` x `out`, M rows, at a width. Times are medians in seconds; peers are those that ran."""

    in_features: int
    out_features: int
    rows: int
    bits: int
    group_size: int
    kernel: str
    seconds: float
    bandwidth: float
    limit_seconds: float
    bound: str
    peers: dict[str, float]
    ratios: dict[str, float]

    @property
    def of_limit(self) -> float:
        """The share of the limit that is reached, 1 at best."""
        return self.limit_seconds / self.seconds


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _best(call: Callable[[], object], repeats: int) -> float:
    return min(seconds(call) for _ in range(repeats))


def read_bandwidth(isa: str, *, size: int = 256 << 20, repeats: int = 9) -> float:
    """Bytes a second of reading a buffer far larger than the caches, at its best, with torch's threads."""
    buffer = streamed_empty((size,), torch.uint8).fill_(1)
    return size / _best(lambda: cpu.read_all(buffer, isa=isa), repeats)


def dot_rate(isa: str, num_bits: int, *, repeats: int = 9) -> float:
    """Multiply-adds a second of dots that wait for no memory, at their best, with torch's threads."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        done = cpu.peak_dots(num_bits, 4000, isa=isa)
        rates.append(done / (time.perf_counter() - start))
    return max(rates)


def measure_limits(isa: str, bits: Sequence[int], *, quick: bool = False) -> Limits:
    """The limits with torch's thread count."""
    repeats = 3 if quick else 9
    return Limits(
        isa,
        torch.get_num_threads(),
        read_bandwidth(isa, size=(96 if quick else 256) << 20, repeats=repeats),
        {b: dot_rate(isa, b, repeats=repeats) for b in bits},
    )


def call_overhead() -> float:
    """Seconds of a layer's call, checks and choice of a kernel included, with next to nothing to compute."""
    from bytelane.layers import QuantLinear

    codes = torch.zeros(4, 16, dtype=torch.int8)
    layer = QuantLinear.from_codes(codes, torch.full((4,), 0.1), num_bits=4, input_scale=0.1, output_scale=0.1)
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    with torch.inference_mode():
        return statistics.median(seconds(lambda: layer(x)) for _ in range(2000))


def _copies(pool: Tensor, size: int) -> Iterator[Tensor]:
    return cycle([pool[i * size : (i + 1) * size] for i in range(pool.numel() // size)])


def _bfloat16(k: int, n: int, x: Tensor, pool: Tensor) -> Callable[[], object]:
    weights = _copies(pool, k * n * 2)
    return lambda: torch.nn.functional.linear(x, next(weights).view(torch.bfloat16).view(n, k))


def _onednn(k: int, n: int, x: Tensor) -> Callable[[], object] | None:
    """The layer in oneDNN: float in and out, quantize, dot, requantize and dequantize."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return None
    count = max(1, min(64, -(-COLD_BYTES // (k * n))))
    made = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    packed = cycle([torch.ops.onednn.qlinear_prepack(made, list(x.shape)) for _ in range(count)])
    scale, zero = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)

    def call() -> Tensor:
        q = torch.quantize_per_tensor(x.float(), 0.02, 128, torch.quint8).int_repr()
        o = torch.ops.onednn.qlinear_pointwise(
            q, 0.02, 128, next(packed), scale, zero, None, 0.05, 0, torch.int8, "none", [], ""
        )
        y: Tensor = (o.to(torch.float32) * 0.05).to(torch.bfloat16)
        return y

    return call


def _xnnpack(k: int, n: int, m: int, bits: int) -> Callable[[], object] | None:
    """The phone's runtime on a graph of the same layer, float32 in and out."""
    if importlib.util.find_spec("ai_edge_litert") is None or bits not in (2, 4, 8):
        return None
    from ai_edge_litert.interpreter import Interpreter

    from bytelane.report import litert

    rng = np.random.default_rng(0)
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (n, k)).astype(np.int8)
    model = litert.build(codes, bits, np.full(n, 0.01, np.float32), 0.02, 0.05, rows=m)
    count = max(1, min(48, -(-COLD_BYTES // (n * row_bytes(k, bits)))))
    x = rng.normal(0, 1, (m, k)).astype(np.float32)
    interpreters = []
    for _ in range(count):
        interpreter = Interpreter(model_content=model, num_threads=torch.get_num_threads())
        interpreter.allocate_tensors()
        litert.check_delegated(interpreter)
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreters.append(interpreter)
    turn = cycle(interpreters)
    return lambda: next(turn).invoke()


def run_layer(
    k: int,
    n: int,
    m: int,
    bits: Sequence[int],
    limits: Limits,
    *,
    group_size: int = 0,
    rounds: int,
    peers: Sequence[str],
) -> list[Result]:
    """One shape at some widths, beside the peers.

    Args:
        k: in_features.
        n: out_features.
        m: rows of activations, bfloat16.
        bits: widths.
        limits: of this run; the bandwidth is measured again here.
        group_size: inputs in a group; 0 for one scale per channel.
        rounds: times each contender runs; medians are kept.
        peers: of `PEERS`, those wanted.
    """
    pool = streamed_empty((max(COLD_BYTES, 2 * k * n),), torch.uint8)
    pool.random_(0, 64)  # as bfloat16, small numbers and never a NaN
    x = torch.randn(m, k).to(torch.bfloat16)
    weight_scale = torch.full((n, k // group_size if group_size else 1), 0.01)
    s_in, s_out = torch.tensor(0.02), torch.tensor(0.05)
    reads = _copies(pool, READ_BYTES)
    calls: dict[str, Callable[[], object]] = {"read": lambda: cpu.read_all(next(reads), isa=limits.isa)}
    kernels = {}
    for b in bits:
        kernel = select("linear", "cpu", x.dtype, b, group_size, m)
        kernels[b] = kernel.name
        weights = _copies(pool, n * row_bytes(k, b))

        def run(b: int = b, kernel: Any = kernel, weights: Iterator[Tensor] = weights) -> object:
            w = next(weights).view(n, row_bytes(k, b))
            return kernel.run(x, w, weight_scale, s_in, s_out, None, b, group_size)

        calls[f"w{b}"] = run
        if "xnnpack" in peers and not group_size and (made := _xnnpack(k, n, m, b)) is not None:
            calls[f"xnnpack{b}"] = made
    if "bfloat16" in peers:
        calls["bfloat16"] = _bfloat16(k, n, x, pool)
    if "onednn" in peers and (made := _onednn(k, n, x)) is not None:
        calls["onednn"] = made
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name in order:
                spent = seconds(calls[name])
                if turn:
                    times[name].append(spent)
            order.append(order.pop(0))
    bandwidth = READ_BYTES / statistics.median(times["read"])
    results = []
    for b in bits:
        own = times[f"w{b}"]
        read, dot = n * row_bytes(k, b) / bandwidth, m * n * k / limits.dot_rate[b]
        beside: dict[str, list[float]] = {p: times[p] for p in PEERS if p in times}
        if f"xnnpack{b}" in times:
            beside["xnnpack"] = times[f"xnnpack{b}"]
        results.append(
            Result(
                k,
                n,
                m,
                b,
                group_size,
                kernels[b],
                statistics.median(own),
                bandwidth,
                max(read, dot),
                "read" if read > dot else "dot",
                {name: statistics.median(t) for name, t in beside.items()},
                {name: statistics.median(a / o for a, o in zip(t, own, strict=True)) for name, t in beside.items()},
            )
        )
    return results


def rounds_of(k: int, n: int, m: int, *, quick: bool) -> int:
    """Enough rounds for a median: fewer of the long ones."""
    if quick:
        return 2
    return max(5, min(41, math.ceil(4e10 / (k * n * (m + 16)))))


def describe() -> dict[str, Any]:
    """The machine and how busy it is."""
    return {"machine": platform.processor() or platform.machine(), "load": os.getloadavg()[0], "isas": machine().isas}


def summary(limits: Limits, overhead: float, results: Sequence[Result]) -> dict[str, Any]:
    """Everything as JSON."""
    return {
        **describe(),
        "limits": asdict(limits),
        "call_overhead_seconds": overhead,
        "results": [{**asdict(r), "of_limit": r.of_limit} for r in results],
    }
