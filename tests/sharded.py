"""Layers cut over ranks as the vLLM plugin cuts them, in bare processes without vLLM, against the NumPy oracle.

Each rank builds its share of a layer from whole stored tensors (`parts.Part`), joins what runs as one call
(`runs.install_runs`) and computes with the plugin's own lines (`runs.run_parts`, `runs.run_reduced`), over a process
group of gloo on CPUs and of NCCL on GPUs. What it must give is the oracle's output of the whole layer, to the bit.

`benchmarks/tensor_parallel.py` runs `check` on two GPUs before it times anything there.
"""

from __future__ import annotations

import datetime
import os
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import oracle
from bytelane.checkpoint.layout import ModuleLayout
from bytelane.integrations.vllm.parts import Part, Span
from bytelane.integrations.vllm.runs import Run, install_runs, run_parts, run_reduced
from bytelane.scheme import Kind, Storage

AllReduce = Callable[[Tensor], Tensor]


@dataclass
class Module:
    """One checkpoint module: whole tensors, and the oracle's outputs of it."""

    codes: np.ndarray
    weight_scale: np.ndarray
    input_scale: np.ndarray | None
    output_scale: np.ndarray | None
    bias: np.ndarray | None
    expected: list[np.ndarray] = field(default_factory=list)


@dataclass
class Case:
    """A layer of one module or of several merged ones; `reduced` cuts its inputs, otherwise each part's outputs.

    Attributes:
        name: for messages.
        bits: N.
        group: inputs that share a scale, 0 for one scale a channel.
        reduced: whether it is row-parallel.
        dtype: of the activations.
        modules: merged into the layer.
        inputs: activations of several row counts, exact in `dtype`.
        exact: whether the sum over ranks is of integers.
    """

    name: str
    bits: int
    group: int
    reduced: bool
    dtype: torch.dtype
    modules: list[Module]
    inputs: list[np.ndarray] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.group == 0


def make_case(
    name: str,
    bits: int,
    shape: tuple[int, int],
    *,
    parts: int = 1,
    reduced: bool = False,
    group: int = 0,
    output: bool = True,
    bias: bool = False,
    one_input_scale: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    rows: tuple[int, ...] = (1, 40),
) -> Case:
    """Random codes with the extremes among them; some outputs saturate, most do not."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    n, k = shape
    case = Case(name, bits, group, reduced, dtype, [])
    for m in rows:
        x = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32) * 2).to(dtype).to(torch.float32).numpy()
        x[0, :4] = 100, -100, np.inf, -np.inf
        case.inputs.append(x)
    for part in range(parts):
        low = -(1 << (bits - 1))
        codes = rng.integers(low, -low, (n, k)).astype(np.int8)
        codes[0], codes[-1] = low, -low - 1
        scale = ((0.5 + rng.random((n, k // group if group else 1))) / (1 << bits)).astype(np.float32)
        s_in = np.float32(0.05 if one_input_scale else 0.04 + 0.01 * part)
        s_out = np.float32(0.2 + 0.3 * part) * np.float32(np.sqrt(k) / 32) if output else None
        module = Module(codes, scale, s_in, s_out, rng.standard_normal(n).astype(np.float32) if bias else None)
        for x in case.inputs:
            y = oracle.linear(x, codes, scale, s_in, s_out, module.bias, group)
            module.expected.append(oracle.to_bfloat16(y) if dtype == torch.bfloat16 else y)
        case.modules.append(module)
    return case


def make_cases(widths: tuple[int, ...]) -> list[Case]:
    """Merged layers that run as one call and that do not, row-parallel ones with and without a bias, and groups."""
    cases = []
    for bits in widths:
        cases += [
            make_case(f"gate and up, {bits} bits", bits, (96, 256), parts=2, one_input_scale=True),
            make_case(f"q, k and v, {bits} bits", bits, (48, 256), parts=3, bias=True),
            make_case(f"down, {bits} bits", bits, (72, 690), reduced=True),  # cuts inside a byte
            make_case(f"o with a bias, {bits} bits", bits, (64, 384), reduced=True, bias=True),
        ]
    long = (40, 3 * 704)  # at 8 bits its sums leave float32's integers
    cases.append(make_case("a long row, 8 bits", 8, long, reduced=True, dtype=torch.float32))
    cases.append(make_case("no output scale, 4 bits", 4, (64, 384), reduced=True, output=False, dtype=torch.float32))
    cases.append(make_case("groups of 32, 4 bits", 4, (64, 384), reduced=True, group=32))
    return cases


def build(case: Case, rank: int, ranks: int, device: torch.device) -> tuple[nn.Module, tuple[Run, ...]]:
    """This rank's layer, its tensors taken and sealed as the plugin does it."""
    sealed = []
    for index, module in enumerate(case.modules):
        n, k = module.codes.shape
        here_n, here_k = (n, k // ranks) if case.reduced else (n // ranks, k)
        stored = {
            "weight": module.codes,
            "scale": module.weight_scale,
            "input": module.input_scale,
            "output": module.output_scale,
            "bias": module.bias,
        }
        layout = ModuleLayout(
            name=f"part{index}",
            kind=Kind.LINEAR,
            shape=(n, k),
            num_bits=case.bits,
            group_size=case.group or None,
            storage=Storage.INT_QUANTIZED,
            weight=f"part{index}.weight",
            scale=f"part{index}.weight_scale",
            input_scale=f"part{index}.input_scale",
            output_scale=None if module.output_scale is None else f"part{index}.output_scale",
        )
        outputs, inputs = (Span.shard(s, w, rank, ranks, layout.name) for s, w in ((here_n, n), (here_k, k)))
        part = Part(layout, outputs, inputs, Path("case"))
        for role, array in stored.items():
            if array is not None:
                part.take(role, torch.from_numpy(np.atleast_1d(array)))
        sealed.append((layout, part.seal()))
    layer = nn.Module()
    return layer, install_runs(layer, sealed, case.modules[0].codes.shape[1], device)


def expected(case: Case, which: int, rank: int, ranks: int) -> Tensor:
    """What this rank must give for the inputs of that number: float32."""
    whole = [torch.from_numpy(module.expected[which]) for module in case.modules]
    return whole[0] if case.reduced else torch.cat([y.chunk(ranks, -1)[rank] for y in whole], -1)


def run(case: Case, layer: nn.Module, runs: tuple[Run, ...], x: Tensor, all_reduce: AllReduce | None) -> Tensor:
    """The layer, with a reduction where it is row-parallel over several ranks."""
    if case.reduced and all_reduce is not None:
        return run_reduced(layer, runs[0], x, all_reduce)
    return run_parts(layer, runs, x)


def check(cases: list[Case], rank: int, ranks: int, device: torch.device, all_reduce: AllReduce) -> int:
    """Hold every case against the oracle on this rank, and the whole layer on one device too; returns the outputs."""
    compared = 0
    for case in cases:
        layer, runs = build(case, rank, ranks, device)
        whole, whole_runs = build(case, 0, 1, device)
        if case.name.startswith("gate"):
            assert len(runs) == 1, "one input scale was meant to make one call"
        for which, inputs in enumerate(case.inputs):
            x = torch.from_numpy(inputs).to(case.dtype)
            here = x.chunk(ranks, -1)[rank].contiguous() if case.reduced else x
            y = run(case, layer, runs, here.to(device), all_reduce).to("cpu")
            alone = run(case, whole, whole_runs, x.to(device), None).to("cpu")
            where = f"{case.name}, {len(x)} rows, rank {rank} of {ranks} on {device.type}"
            assert y.dtype == case.dtype, where
            assert torch.equal(alone.to(torch.float32), expected(case, which, 0, 1)), f"the whole of {where}"
            want = expected(case, which, rank, ranks)
            if case.exact:
                assert torch.equal(y.to(torch.float32), want), where
            else:
                # Float sums in another order: a value on a rounding boundary may move by one step of int8, and
                # bfloat16 rounds a value of up to 128 steps by half a step on either side.
                step = float(case.modules[0].output_scale)
                assert float((y.to(torch.float32) - want).abs().max()) <= 2 * step, where
            compared += y.numel()
    return compared


def check_graph(cases: list[Case], rank: int, ranks: int, device: torch.device, all_reduce: AllReduce) -> int:
    """Row-parallel layers with their reductions in one CUDA graph, replayed on inputs it was not captured with."""
    chosen = [case for case in cases if case.reduced and case.exact]
    built = [build(case, rank, ranks, device) for case in chosen]
    shares = [
        [torch.from_numpy(x).to(case.dtype).chunk(ranks, -1)[rank].contiguous() for x in case.inputs] for case in chosen
    ]
    held = [torch.zeros_like(share[-1], device=device) for share in shares]

    def step() -> list[Tensor]:
        return [run(case, *layer, x, all_reduce) for case, layer, x in zip(chosen, built, held, strict=True)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL watches from a thread of its own
        outputs = step()
    for x, share in zip(held, shares, strict=True):
        x.copy_(share[-1])
    graph.replay()
    torch.cuda.synchronize()
    for case, y in zip(chosen, outputs, strict=True):
        want = expected(case, len(case.inputs) - 1, rank, ranks)
        assert torch.equal(y.to("cpu", torch.float32), want), f"{case.name} in a graph"
    return sum(y.numel() for y in outputs)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(rank: int, ranks: int, port: int, device_type: str) -> tuple[torch.device, AllReduce]:
    """Join the process group; the device of this rank, and its all-reduce."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=120))

    def all_reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    return device, all_reduce


def on_one_rank(rank: int, ranks: int, port: int, device_type: str, widths: tuple[int, ...]) -> None:
    """Everything on one rank; run in a process of its own."""
    if device_type == "cpu":
        torch.set_num_threads(1)
    device, all_reduce = start(rank, ranks, port, device_type)
    try:
        cases = make_cases(widths)
        assert check(cases, rank, ranks, device, all_reduce) > 10_000
        if device_type == "cuda":
            assert check_graph(cases, rank, ranks, device, all_reduce)
    finally:
        dist.destroy_process_group()
