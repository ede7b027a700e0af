"""Sums over two GPUs: the plugin's sharded layers held against the oracle, then what a reduction and a layer take.

    python benchmarks/tensor_parallel.py                     # two CUDA devices, NCCL
    python benchmarks/tensor_parallel.py --device cpu --quick   # the same lines over gloo, in seconds

vLLM is not needed: the layers are cut, summed and finished by the plugin's own lines (`tests/sharded.py`). First every
rank's outputs are compared with the NumPy oracle's, for equality, also from a CUDA graph that holds the reductions.
Then, in CUDA graphs, medians:

- a reduction of `M x hidden` accumulators: all-reduce in int32 and in bfloat16, and int32 reduce-scatter with an
  all-gather of int8, the other exact form (docs/serving.md);
- a row-parallel layer of 4 bits (a Llama 8B's `down_proj`): whole on one device, and over all ranks with its reduction.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Asking how many devices there are must not touch one: the ranks are forked from here, so that what is imported once
# is imported for all.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

import sharded
from bytelane.integrations.vllm.runs import Run, run_parts, run_reduced
from bytelane.scheme import row_bytes

HIDDEN = (1536, 4096)
ROWS = (1, 16, 512, 8192)
LAYER = (4096, 14336)
COPIES = 4
"""Of a layer's weights, so that the next one is not in the cache."""


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> float:
    """Of one call; on CUDA from a graph of all of them, a few times over."""
    for call in calls:
        call()
    times = []
    if device.type != "cuda":
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - began) / len(calls))
        return statistics.median(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    for _ in range(repeats + 2):
        dist.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


def reductions(rows: int, hidden: int, ranks: int, device: torch.device, calls: int, repeats: int) -> dict[str, float]:
    """Seconds of each form of one reduction."""
    whole = {dtype: torch.ones(rows, hidden, dtype=dtype, device=device) for dtype in (torch.int32, torch.bfloat16)}
    found = {}
    for name, dtype in (("int32", torch.int32), ("bfloat16", torch.bfloat16)):
        found[name] = median_seconds([lambda x=whole[dtype]: dist.all_reduce(x)] * calls, device, repeats)
    if device.type == "cuda" and rows * hidden % ranks == 0:  # gloo has no reduce-scatter
        flat = whole[torch.int32].reshape(-1)
        mine = torch.empty(flat.numel() // ranks, dtype=torch.int32, device=device)
        codes = torch.empty(mine.numel(), dtype=torch.int8, device=device)
        gathered = torch.empty(flat.numel(), dtype=torch.int8, device=device)

        def scattered() -> None:
            dist.reduce_scatter_tensor(mine, flat)
            dist.all_gather_into_tensor(gathered, codes)

        found["int32 scattered, int8 gathered"] = median_seconds([scattered] * calls, device, repeats)
    return found


def random_layer(inputs: int, outputs: int, device: torch.device) -> tuple[nn.Module, Run]:
    """A layer of random 4-bit codes with both scales."""
    layer, run = nn.Module(), Run("", 4, 0, LAYER[1])
    rows = torch.randint(0, 256, (outputs, row_bytes(inputs, 4)), dtype=torch.uint8)
    scales = {"weight_scale": torch.full((outputs, 1), 0.01), "bias": None}
    scales |= {"input_scale": torch.tensor(0.05), "output_scale": torch.tensor(0.5)}
    for name, tensor in {"packed": rows, **scales}.items():
        layer.register_buffer(name, None if tensor is None else tensor.to(device))
    return layer, run


def layers(
    rows: int, ranks: int, device: torch.device, all_reduce: sharded.AllReduce, calls: int, repeats: int
) -> dict[str, float]:
    """Seconds of the layer on one device, and over all ranks."""
    outputs, inputs = LAYER
    found = {}
    for name, share in (("one device", inputs), ("all ranks", inputs // ranks)):
        copies = [random_layer(share, outputs, device) for _ in range(COPIES)]
        x = torch.randn(rows, share, dtype=torch.bfloat16, device=device)

        def call(copy: tuple[nn.Module, Run], x: Tensor = x, reduced: bool = share < inputs) -> Tensor:
            layer, run = copy
            return run_reduced(layer, run, x, all_reduce) if reduced else run_parts(layer, [run], x)

        found[name] = median_seconds([lambda c=copies[i % COPIES]: call(c) for i in range(calls)], device, repeats)
    return found


def compile_all(which: int, of: int, widths: tuple[int, ...]) -> None:
    """Run a share of the cases once on one device, alone, for the sake of Triton's cache on disk."""
    device = torch.device("cuda", which % torch.cuda.device_count())
    for case in sharded.make_cases(widths)[which::of]:
        for ranks in (1, 2):
            layer, runs = sharded.build(case, 0, ranks, device)
            for inputs in case.inputs:
                x = torch.from_numpy(inputs).to(case.dtype).to(device)
                here = x.chunk(ranks, -1)[0].contiguous() if case.reduced else x
                sharded.run(case, layer, runs, here, None if ranks == 1 else lambda tensor: tensor)


def on_rank(rank: int, ranks: int, port: int, device_type: str, quick: bool, widths: tuple[int, ...]) -> None:
    """Check, then time; rank 0 prints."""
    device, all_reduce = sharded.start(rank, ranks, port, device_type)
    began = time.perf_counter()

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - began:5.1f} s  {text}", flush=True)

    cases = sharded.make_cases(widths)
    compared = sharded.check(cases, rank, ranks, device, all_reduce)
    graphed = sharded.check_graph(cases, rank, ranks, device, all_reduce) if device.type == "cuda" else 0
    say(f"{compared} outputs of {len(cases)} layers over {ranks} ranks are the oracle's, and {graphed} from a graph")
    found: list[dict[str, Any]] = []
    repeats, calls = (3, 2) if quick else (9, 20)
    for hidden in HIDDEN[:1] if quick else HIDDEN:
        for rows in ROWS[:2] if quick else ROWS:
            seconds = reductions(rows, hidden, ranks, device, calls if rows < 8192 else 4, repeats)
            found.append({"what": "reduction", "rows": rows, "hidden": hidden, "seconds": seconds})
            say(f"{rows:5} x {hidden}: " + ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in seconds.items()))
    for rows in ROWS[:1] if quick else (1, 16, 512, 4096):
        seconds = layers(rows, ranks, device, all_reduce, calls if rows < 512 else 8, repeats)
        found.append({"what": "layer", "rows": rows, "shape": LAYER, "seconds": seconds})
        say(f"{LAYER[1]} x {LAYER[0]}, {rows} rows: " + ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in seconds.items()))
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        ran = {"device": name, "ranks": ranks, "compared": compared, "graphed": graphed}
        print(json.dumps({**ran, "torch": torch.__version__, "results": found}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few sizes, few repeats")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.ranks:
        sys.exit(f"needs {arguments.ranks} CUDA devices, found {torch.cuda.device_count()}; or --device cpu")
    torch.set_num_threads(1)  # no pool of threads before the fork
    widths = (4,) if arguments.quick else (2, 4, 8)
    options: dict[str, Any] = {"join": True, "start_method": "fork"}
    if arguments.device == "cuda":
        shares = min(os.cpu_count() or 1, len(sharded.make_cases(widths)))
        multiprocessing.start_processes(compile_all, (shares, widths), nprocs=shares, **options)
    common = (arguments.ranks, sharded.free_port(), arguments.device, arguments.quick, widths)
    multiprocessing.start_processes(on_rank, common, nprocs=arguments.ranks, **options)


if __name__ == "__main__":
    main()
