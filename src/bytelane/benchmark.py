"""One integer linear layer beside the machine's limits and its peers, all in one run.

Every result is a ratio inside the run. Rounds go through all contenders, each in an order of its own, so that all see
the same machine and none always follows the same other one, whose traces are in the caches. Weights rotate through
enough copies that no cache holds one until its turn comes again. The limit of a layer is the slower of

    read    its packed bytes and weight scales over the bandwidth of reading memory, measured in the same rounds
    dot     its multiply-adds over the rate of the widest tile on operands that stay in the first-level cache

Peers that are installed run beside it (benchmark_peers.py), each with threads of its own that go on spinning for some
milliseconds after a call. So a turn begins with a pause, in which the others' threads fall asleep, and with calls that
are not timed. They wake its own threads, and the processor: after a pause of milliseconds a core was seen to take three
more before it did at full speed what it had done before, so that a layer's second call took 1.3 times as long as its
twentieth. The timed calls find what they find in the middle of a model. A layer has a budget of seconds; a contender
that has spent its share of it, and has run a few times, sits out the rounds that remain, so that a slow one cannot take
them all.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelane.benchmark_peers import ANY_WIDTH, COLD_BYTES, Layer, Peers, Timed, copies, rotate, timed
from bytelane.dispatch import Kernel, machine, select
from bytelane.kernels import cpu
from bytelane.memory import streamed_empty

READ_BYTES = 32 << 20

FEWEST_ROUNDS = 3
MOST_ROUNDS = 21

PAUSE = 0.012
"""Seconds before a turn. OpenMP's threads were seen to spin for 7 ms in another's turn, which then took as long."""

WARM = 0.005
"""Seconds of untimed calls, one at least, that a turn begins with."""

BURST = 0.002
"""Seconds of timed calls, one at least, of a turn; their mean is its result."""


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
    dot_rate: float
    limit_seconds: float
    bound: str
    peers: dict[str, float]
    ratios: dict[str, float]

    @property
    def of_limit(self) -> float:
        """The share of the limit that is reached, 1 at best."""
        return self.limit_seconds / self.seconds


DOT_REPEATS = 20000
"""Of the widest tile's 64 steps: some five milliseconds."""


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
        done = cpu.peak_dots(num_bits, DOT_REPEATS, isa=isa)
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


def measure(
    calls: Mapping[str, Timed], budget: float, *, most: int = MOST_ROUNDS, pause: float = PAUSE
) -> dict[str, list[float | None]]:
    """Let contenders take turns, in rounds; the order of each round is drawn, the same in every run.

    Args:
        calls: the contenders; a turn is a pause, calls for `WARM` seconds that do not count, and for `BURST` that do.
        budget: seconds for all of them together. A contender that has run `FEWEST_ROUNDS` times and spent its share
            sits out; when none is left, or after `most` rounds, the measurement ends.
        most: rounds at most.
        pause: seconds.

    Returns:
        For each contender the seconds of a call by round, the mean of its turn; None where it sat out.
    """
    share = budget / len(calls)
    spent, times = dict.fromkeys(calls, 0.0), {name: list[float | None]() for name in calls}
    order, draw = list(calls), random.Random(0)
    for turn in range(most):
        draw.shuffle(order)
        running = {name for name in order if turn < min(FEWEST_ROUNDS, most) or spent[name] < share}
        if not running:
            break
        for name in order:
            if name not in running:
                times[name].append(None)
                continue
            time.sleep(pause)
            warm, _ = _calls(calls[name], WARM)
            took, count = _calls(calls[name], BURST)
            times[name].append(took / count)
            spent[name] += pause + warm + took
    return times


def _calls(call: Timed, least: float) -> tuple[float, int]:
    """Make calls until they have taken so many seconds; how long they took, and how many they were."""
    took, count = 0.0, 0
    while count == 0 or took < least:
        took += call()
        count += 1
    return took, count


def median(times: Sequence[float | None]) -> float:
    """The median of the rounds that a contender ran."""
    return statistics.median(t for t in times if t is not None)


def median_ratio(times: Sequence[float | None], base: Sequence[float | None]) -> float:
    """The median of `times / base` over the rounds that both ran."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True) if t is not None and b is not None)


def run_layer(
    k: int,
    n: int,
    m: int,
    bits: Sequence[int],
    limits: Limits,
    *,
    group_size: int = 0,
    seconds: float,
    most: int = MOST_ROUNDS,
    peers: Peers,
) -> list[Result]:
    """One shape at some widths, beside the peers.

    Args:
        k: in_features.
        n: out_features.
        m: rows of activations, bfloat16.
        bits: widths.
        limits: of this run, at their best; what a layer is held to is measured again here, in its own rounds.
        group_size: inputs in a group; 0 for one scale per channel.
        seconds: the budget of the rounds, see `measure`.
        most: rounds at most.
        peers: those wanted.
    """
    pool = streamed_empty((max(COLD_BYTES, 2 * k * n),), torch.uint8)
    pool.random_(0, 64)  # as bfloat16, small numbers and never a NaN
    x = torch.randn(m, k).to(torch.bfloat16)
    s_in, s_out = torch.tensor(0.02), torch.tensor(0.05)
    reads = rotate(pool, READ_BYTES)
    calls: dict[str, Timed] = {"read": timed(lambda: cpu.read_all(next(reads), isa=limits.isa))}
    kernels, dots = {}, {}
    with torch.inference_mode():
        for b in bits:
            dots[b] = cpu.peak_dots(b, DOT_REPEATS, isa=limits.isa)
            calls[f"dot{b}"] = timed(lambda b=b: cpu.peak_dots(b, DOT_REPEATS, isa=limits.isa))  # type: ignore[misc]
            layer = Layer(k, n, m, b, group_size)
            kernel = select("linear", "cpu", x.dtype, b, group_size, m)
            kernels[b] = kernel.name
            turn = cycle(_layers(kernel, layer, x, pool, s_in, s_out))
            calls[f"w{b}"] = timed(lambda turn=turn: next(turn)(x))  # type: ignore[misc]
            for name in peers.wanted:
                key = _key(name, b)
                if key not in calls and (made := peers.make(name, layer, x, pool)) is not None:
                    calls[key] = made
        times = measure(calls, seconds, most=most)
    bandwidth = READ_BYTES / median(times["read"])
    results = []
    for b in bits:
        own = times[f"w{b}"]
        read = Layer(k, n, m, b, group_size).read_bytes / bandwidth
        dot_rate = dots[b] / median(times[f"dot{b}"])
        dot = m * n * k / dot_rate
        beside = {name: times[_key(name, b)] for name in peers.wanted if _key(name, b) in times}
        results.append(
            Result(
                k,
                n,
                m,
                b,
                group_size,
                kernels[b],
                median(own),
                bandwidth,
                dot_rate,
                max(read, dot),
                "read" if read > dot else "dot",
                {name: median(t) for name, t in beside.items()},
                {name: median_ratio(t, own) for name, t in beside.items()},
            )
        )
    return results


def _layers(
    kernel: Kernel, layer: Layer, x: Tensor, pool: Tensor, s_in: Tensor, s_out: Tensor
) -> list[Callable[[Tensor], Tensor]]:
    """The layer over each slice of a pool in turn, called as `QuantLinear` calls it; scales of groups rotate too."""
    weights = rotate(pool, layer.weight_bytes)
    count = copies(layer.read_bytes, layer.m) if layer.group_size else pool.numel() // layer.weight_bytes
    scale = streamed_empty((layer.n, layer.groups), torch.float32).fill_(0.01)
    made: list[Callable[[Tensor], Tensor]] = []
    for w in islice(weights, count):
        arguments = (w.view(layer.n, -1), scale, s_in, s_out, None, layer.bits, layer.group_size)
        if kernel.bind is None:
            made.append(lambda x, arguments=arguments: kernel.run(x, *arguments))  # type: ignore[misc]
        else:
            made.append(kernel.bind(x.dtype, layer.k, *arguments))
    return made


def _key(peer: str, bits: int) -> str:
    return peer if peer in ANY_WIDTH else f"{peer}{bits}"


def thread_counts(most: int) -> list[int]:
    """1, 2, 4 and so on, and `most`."""
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i < most} | {most})


def measure_scaling(isa: str, bits: Sequence[int], *, quick: bool = False) -> list[Limits]:
    """The limits at 1, 2, 4 ... torch's thread count, which is left as it was."""
    threads = torch.get_num_threads()
    found = []
    try:
        for count in thread_counts(threads):
            torch.set_num_threads(count)
            found.append(measure_limits(isa, bits, quick=quick))
    finally:
        torch.set_num_threads(threads)
    return found


def processor() -> str:
    """The CPU's name, with family and model where Linux tells them: cloud machines hide the name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    name = fields.get("model name", platform.machine())
    if "cpu family" not in fields:
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def versions() -> dict[str, str]:
    """Releases of what took part, where installed."""
    found = {}
    for name in ("bytelane", "torch", "transformers", "ai-edge-litert", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """The machine and how busy it is; no name or place of it."""
    return {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "isas": machine().isas,
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "load": os.getloadavg()[0],
    }


def summary(
    scaling: Sequence[Limits], overhead: float, results: Sequence[Result], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """Everything as JSON; `limits` are those of the run's thread count, the last of `scaling`."""
    return {
        **describe(),
        "limits": asdict(scaling[-1]),
        "limits_by_threads": [asdict(limits) for limits in scaling],
        "call_overhead_seconds": overhead,
        "skipped": dict(skipped),
        "results": [{**asdict(r), "of_limit": r.of_limit} for r in results],
    }
