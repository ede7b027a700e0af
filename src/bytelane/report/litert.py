"""One fully connected operator in the vendor runtime: author the graph, check who runs it, run it.

    x float32 [M, K] -> QUANTIZE -> int8 -> FULLY_CONNECTED -> int8 -> DEQUANTIZE -> y float32 [M, N]

The weights are symmetric, one scale per output channel, N-bit codes in two's complement, the lowest index in the lowest
bits of a byte. The operator version tells the runtime the width: 6 for int8, 10 for int4, 14 for int2 (8 would mean
sparse). The optional bias is an int32 per channel in units of f32(s_in * s_w[n]).

The numbers of interest are those of the XNNPACK delegate, which the interpreter applies by default on x86-64. It leaves
some graphs to the runtime's reference operators, silently and with other arithmetic (Q31 fixed point), so `Graph`
raises when the delegate did not take all three operators. Importing this module needs ai-edge-litert (the `litert`
extra).
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

WEIGHT_TYPES = {2: schema.TensorType.INT2, 4: schema.TensorType.INT4, 8: schema.TensorType.INT8}
VERSIONS = {2: 14, 4: 10, 8: 6}


class NotDelegatedError(RuntimeError):
    """The delegate left an operator to the runtime's reference kernels, whose arithmetic is another one."""


def _weight_bytes(codes: Array, bits: int) -> NDArray[np.uint8]:
    """Codes `[N, K]` to the runtime's bytes: one dense stream over the whole matrix, without row padding."""
    per_byte = 8 // bits
    flat = codes.reshape(-1).astype(np.uint8) & np.uint8(2**bits - 1)
    flat = np.pad(flat, (0, -flat.size % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(flat.shape[0], dtype=np.uint8)
    for place in range(per_byte):
        packed |= flat[:, place] << np.uint8(place * bits)
    return packed


def _quantization(given: ArrayLike) -> Any:
    scales = np.asarray(given, dtype=np.float32).reshape(-1)
    return schema.QuantizationParametersT(
        scale=scales, zeroPoint=np.zeros(scales.size, dtype=np.int64), quantizedDimension=0
    )


def build(
    codes: Array,
    bits: int,
    weight_scale: Array,
    input_scale: ArrayLike,
    output_scale: ArrayLike,
    bias: Array | None = None,
    rows: int = 1,
    bias_scale: Array | None = None,
) -> bytes:
    """Author the graph.

    Args:
        codes: int8 `[N, K]`.
        bits: 2, 4 or 8.
        weight_scale: float32, N elements.
        input_scale: float32.
        output_scale: float32.
        bias: int32 `[N]` or None.
        rows: M.
        bias_scale: what the bias tensor declares as its scale; f32(s_in * s_w) when None. Only a probe of whether the
            runtime reads it passes another.

    Returns:
        the flatbuffer.
    """
    n, k = codes.shape
    weight_scale = np.asarray(weight_scale, dtype=np.float32).reshape(-1)
    model = schema.ModelT(version=3, operatorCodes=[], buffers=[schema.BufferT()])
    tensors: list[Any] = []

    def tensor(
        name: str, shape: list[int], kind: Any, scales: ArrayLike | None = None, data: Array | None = None
    ) -> int:
        buffer = 0
        if data is not None:
            model.buffers.append(schema.BufferT(data=np.ascontiguousarray(data).view(np.uint8).reshape(-1)))
            buffer = len(model.buffers) - 1
        quantization = None if scales is None else _quantization(scales)
        tensors.append(
            schema.TensorT(shape=shape, type=kind, buffer=buffer, name=name, quantization=quantization, hasRank=True)
        )
        return len(tensors) - 1

    kinds = schema.TensorType
    x = tensor("x", [rows, k], kinds.FLOAT32)
    q = tensor("q", [rows, k], kinds.INT8, [float(np.asarray(input_scale))])
    w = tensor("w", [n, k], WEIGHT_TYPES[bits], weight_scale, _weight_bytes(codes, bits))
    inputs = [q, w]
    if bias is not None:
        if bias_scale is None:
            bias_scale = np.asarray(input_scale, dtype=np.float32) * weight_scale
        inputs.append(tensor("bias", [n], kinds.INT32, bias_scale, np.asarray(bias, dtype=np.int32)))
    o = tensor("o", [rows, n], kinds.INT8, [float(np.asarray(output_scale))])
    y = tensor("y", [rows, n], kinds.FLOAT32)

    ops, options = schema.BuiltinOperator, schema.BuiltinOptions
    dense = schema.FullyConnectedOptionsT()
    operators: list[Any] = []
    for code, version, ins, out, kind, option in (
        (ops.QUANTIZE, 1, [x], q, options.QuantizeOptions, schema.QuantizeOptionsT()),
        (ops.FULLY_CONNECTED, VERSIONS[bits], inputs, o, options.FullyConnectedOptions, dense),
        (ops.DEQUANTIZE, 2, [o], y, options.DequantizeOptions, schema.DequantizeOptionsT()),
    ):
        model.operatorCodes.append(schema.OperatorCodeT(deprecatedBuiltinCode=code, version=version, builtinCode=code))
        operators.append(
            schema.OperatorT(
                opcodeIndex=len(operators), inputs=ins, outputs=[out], builtinOptionsType=kind, builtinOptions=option
            )
        )
    model.subgraphs = [schema.SubGraphT(tensors=tensors, inputs=[x], outputs=[y], operators=operators, name="main")]
    builder = flatbuffers.Builder(codes.size + 4096)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def check_delegated(interpreter: Any) -> None:
    """Raise `NotDelegatedError` unless one delegate node runs the graph from `x` to `y`, weights included."""
    names = {t["name"]: t["index"] for t in interpreter.get_tensor_details()}
    # The operators the delegate replaced stay in the list, so their presence says nothing; its own nodes are appended
    # and name what they read and write. An operator it refused splits it into one node before and one after.
    nodes = [op for op in interpreter._get_ops_details() if op["op_name"] == "DELEGATE"]
    whole = [op for op in nodes if {names["x"], names["w"]} <= set(op["inputs"]) and names["y"] in op["outputs"]]
    if len(nodes) != 1 or len(whole) != 1:
        raise NotDelegatedError(f"{len(nodes)} delegate nodes, {len(whole)} of them with the fully connected operator")


class Graph:
    """The graph of `build` in an interpreter: `Graph(...)(x)` gives y. The arguments are those of `build`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        model = build(*arguments, **options)
        self._interpreter = Interpreter(model_content=model, num_threads=1)
        self._interpreter.allocate_tensors()
        self._x = self._interpreter.get_input_details()[0]["index"]
        self._y = self._interpreter.get_output_details()[0]["index"]
        check_delegated(self._interpreter)

    def __call__(self, x: Array) -> NDArray[np.float32]:
        """float32 `[M, K]` to float32 `[M, N]`."""
        self._interpreter.set_tensor(self._x, np.ascontiguousarray(x, dtype=np.float32))
        self._interpreter.invoke()
        return np.asarray(self._interpreter.get_tensor(self._y), np.float32)
