"""Compiling all kernels of a model at once, before its first token, instead of one after the other in the midst of it.

    report = compile_ahead(model)           # on a CUDA device
    report.kernels, report.seconds

Which kernels a model needs follows from its layers and from how many rows they are given. `recorded` says so without
running any: it calls the model's step and each kind of layer with every number of rows, while launches are noted
instead of made. Launches that Triton compiles alike (`Job.key`) are one job. The jobs go to processes of their own
(Triton holds Python's lock while it compiles), which fill Triton's cache on disk; a note beside it says that all of
them are there, so that the next start asks for nothing.

The bound: at most `report.kernels` compilations, shared out among as many processes as there are cores (16 at most).
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from transformers import PreTrainedModel
from triton import knobs

from bytelane.kernels.triton_launch import Launch, noting
from bytelane.layers import QuantLinear
from bytelane.scheme import Numerics
from bytelane.step_graph import StepGraph, unknown_step

MAX_WORKERS = 16
"""Processes at most: each holds half a gigabyte and imports torch first."""

ROWS = (*range(1, 17), *range(32, 1025, 16))
"""Rows of activations that stand for all up to 1024, a piece of a prompt: past 16, tiles are of 16 rows or more."""


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel and what Triton compiles it for.

    Attributes:
        module: the kernel's.
        name: the kernel's.
        dtypes: of its tensors, by torch's names.
        numbers: the arguments after them.
        constants: the `tl.constexpr` arguments.
        options: of the compiler.
    """

    module: str
    name: str
    dtypes: tuple[str, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, launch: Launch, dtypes: Sequence[torch.dtype]) -> Job:
        """The compilation of a launch on tensors of these dtypes, each aligned to 16 bytes."""
        names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
        kernel = launch.kernel
        return cls(kernel.fn.__module__, kernel.__name__, names, launch.numbers, launch.constants, launch.options)

    def key(self, kernel: Any) -> str:
        """Equal for jobs that Triton compiles alike: it looks at whether an integer is 1, and divisible by 16."""
        names = kernel.arg_names[len(self.dtypes) :]
        plain = kernel.do_not_specialize
        kinds = [_kind(number, name in plain) for number, name in zip(self.numbers, names, strict=False)]
        return json.dumps([self.module, self.name, self.dtypes, kinds, self.constants, self.options], sort_keys=True)


def _kind(number: Any, plain: bool) -> str:
    if isinstance(number, float):
        return "float"
    width = "i32" if -(1 << 31) <= number < 1 << 31 else "i64"
    if plain:
        return width
    return "1" if number == 1 else f"{width}/16" if number % 16 == 0 else width


@dataclass(frozen=True)
class Report:
    """What `compile_ahead` did.

    Attributes:
        kernels: distinct compilations the model needs.
        compiled: of them, those asked of the processes; 0 where the note says that all are on disk.
        workers: processes.
        seconds: in all.
    """

    kernels: int
    compiled: int
    workers: int
    seconds: float


def distinct_jobs(launches: Iterable[tuple[Launch, tuple[torch.dtype, ...]]]) -> list[tuple[Job, Any]]:
    """The jobs of launches, each once, with their kernels."""
    found: dict[str, tuple[Job, Any]] = {}
    for launch, dtypes in launches:
        job = Job.of(launch, dtypes)
        found.setdefault(job.key(launch.kernel), (job, launch.kernel))
    return list(found.values())


def _layer_kind(layer: QuantLinear) -> tuple[Any, ...]:
    s_out = layer.output_scale
    sides = (layer.input_scale is None, None if s_out is None else s_out.numel(), layer.bias is None)
    return (layer.in_features, layer.out_features, layer.scheme, layer.numerics, *sides)


@torch.inference_mode()
def recorded(model: PreTrainedModel, rows: Iterable[int] = ROWS) -> list[tuple[Launch, tuple[torch.dtype, ...]]]:
    """Every launch of a model: of its step where that is known, and of each kind of linear layer for `rows`.

    No kernel of bytelane's runs, so what torch's own operations see between them is whatever lay in memory.
    """
    head = model.get_output_embeddings()
    kinds: dict[tuple[Any, ...], QuantLinear] = {}
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.numerics is Numerics.INTEGER:  # emulation has no kernels
            kinds.setdefault((*_layer_kind(layer), layer is head), layer)  # the head is given the last row only
    with noting() as found:
        if unknown_step(model) is None:
            # an odd and an even number of tokens, and one: all that norms, tables and the cache tell apart
            step, ids = StepGraph(model, 64), torch.zeros(32, dtype=torch.int64)
            for tokens in (5, 32, 1):
                step.read(ids[:tokens])
            step.call(0)
        for (*_, is_head), layer in kinds.items():
            for count in (1,) if is_head else rows:
                layer(torch.empty((1, count, layer.in_features), dtype=model.dtype, device=model.device))
    return found


def compile_jobs(
    jobs: Sequence[tuple[Job, Any]],
    capability: int,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compile jobs side by side into Triton's cache on disk, unless a note there says that they are.

    Args:
        jobs: as `distinct_jobs` gives them.
        capability: of the device, 90 for 9.0.
        workers: processes; as many as cores by default, and no more than jobs.
        progress: called with the jobs done and the jobs in all.

    Raises:
        RuntimeError: a kernel that does not compile, by its name; what the compiler said is on standard error.
    """
    start = time.perf_counter()
    note = _note(jobs, capability)
    if note.exists() or not jobs:
        return Report(len(jobs), 0, 0, time.perf_counter() - start)
    count = max(1, min(workers or os.cpu_count() or 1, MAX_WORKERS, len(jobs)))
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job, _ in jobs:
        waiting.put(job)
    failed: list[Job] = []
    done = 0
    lock = threading.Lock()

    def serve() -> None:
        nonlocal done
        command = [sys.executable, "-m", "bytelane.kernels.compile_worker", str(capability)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            while not failed:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    break
                process.stdin.write(json.dumps(asdict(job)) + "\n")
                process.stdin.flush()
                answered = process.stdout.readline()  # nothing where the process is gone
                with lock:
                    if not answered:
                        failed.append(job)
                        break
                    done += 1
                    progress(done, len(jobs))

    threads = [threading.Thread(target=serve) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        job = failed[0]
        raise RuntimeError(f"{job.name} does not compile for capability {capability}: {job.constants} {job.options}")
    if done < len(jobs):
        raise RuntimeError(f"{done} of {len(jobs)} kernels are compiled: a compiling process could not be reached")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()
    return Report(len(jobs), len(jobs), count, time.perf_counter() - start)


def _note(jobs: Sequence[tuple[Job, Any]], capability: int) -> Path:
    """The file whose presence says that all jobs are compiled: its name holds all that they depend on."""
    keys = sorted(job.key(kernel) + kernel.cache_key for job, kernel in jobs)
    digest = hashlib.sha256(json.dumps([triton.__version__, capability, keys]).encode()).hexdigest()
    return Path(knobs.cache.dir) / f"bytelane-{digest[:32]}.compiled"


def compile_ahead(
    model: PreTrainedModel,
    *,
    rows: Iterable[int] = ROWS,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compile every kernel a model on a CUDA device needs; see the head of this file.

    Args:
        model: as `load_model` returns it.
        rows: numbers of rows to be ready for.
        workers: as for `compile_jobs`.
        progress: likewise.

    Raises:
        ValueError: a model that is not on a CUDA device.
        RuntimeError: as for `compile_jobs`.
    """
    if model.device.type != "cuda":
        raise ValueError(f"kernels are compiled for CUDA devices, the model is on {model.device.type}")
    start = time.perf_counter()
    major, minor = torch.cuda.get_device_capability(model.device)
    jobs = distinct_jobs(recorded(model, rows))
    found = compile_jobs(jobs, 10 * major + minor, workers=workers, progress=progress)
    return replace(found, seconds=time.perf_counter() - start)
