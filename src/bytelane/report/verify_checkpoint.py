"""Check a checkpoint against FORMAT.md to the last code, and a sample of its layers against two other programs.

Opening a checkpoint checks headers and scales; here every code and every plain value is read too. Then some layers,
spread over the model and its schemes, run on adversarial inputs and are compared, bit for bit, with

- the NumPy oracle, on codes that are read from the file a second time by a parser of a few lines of its own;
- the vendor's runtime, LiteRT, where it is installed and the layer is one it can hold.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelane.checkpoint import Checkpoint, QuantizedModule, QuantizedTensors
from bytelane.errors import NotRepresentableError
from bytelane.models import build_linear
from bytelane.packing import unpack_rows
from bytelane.report import oracle
from bytelane.scheme import Kind, LinearScheme, Storage

CHANNELS = 256
"""Output channels of a sampled layer that are compared; the layer itself runs whole."""
ROWS = 8
"""Rows of activations a sampled layer reads."""
VENDOR_BITS = (2, 4, 8)
VENDOR_INT4_BIAS = 1 << 26
"""Biases of 4-bit layers that the vendor holds on any processor, in accumulator units: half of what wraps."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerCheck:
    """One sampled layer.

    Attributes:
        name: the layer.
        scheme: `w4a8o8` and the like.
        values: outputs compared.
        differing: outputs whose bits are not the oracle's.
        codes_differ: weight codes that the second reading of the file gave otherwise.
        vendor_differing: outputs whose bits are not the vendor's; None where it was not asked.
        vendor_skipped: why it was not asked; None when it was.
    """

    name: str
    scheme: str
    values: int
    differing: int
    codes_differ: int
    vendor_differing: int | None = None
    vendor_skipped: str | None = None

    @property
    def right(self) -> bool:
        """Whether everything that was compared is equal."""
        return not (self.differing or self.codes_differ or self.vendor_differing)


@dataclass(frozen=True)
class CheckpointCheck:
    """A whole checkpoint.

    Attributes:
        model: the folder.
        modules: quantized modules whose codes were all read.
        codes: how many codes that is.
        plain_tensors: unquantized tensors read.
        layers: the sampled layers.
        notes: what FORMAT.md allows and a person may still want to know.
    """

    model: str
    modules: int
    codes: int
    plain_tensors: int
    layers: tuple[LayerCheck, ...]
    notes: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether every sampled layer is."""
        return all(layer.right for layer in self.layers)


def stored_codes(file: Path, name: str, module: QuantizedModule) -> NDArray[np.int8]:
    """A module's codes straight from the file: header by `json`, bits by `numpy.unpackbits`, nothing of the package."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entry = json.loads(stream.read(length))[name]
        begin, end = entry["data_offsets"]
        stream.seek(8 + length + begin)
        raw = np.frombuffer(stream.read(end - begin), np.uint8)
    rows, columns = module.shape
    bits = module.scheme.weight.num_bits
    if entry["dtype"] == "I8":
        return raw.view(np.int8).reshape(rows, columns)
    stream_bits = np.unpackbits(raw.reshape(rows, -1), axis=1, count=columns * bits, bitorder="little")
    values = stream_bits.reshape(rows, columns, bits).astype(np.int16) @ (1 << np.arange(bits)).astype(np.int16)
    return (values - (1 << (bits - 1))).astype(np.int8)


def codes_name(module: QuantizedModule) -> str:
    """The name of the tensor that holds a module's codes."""
    if module.storage is Storage.PACK_QUANTIZED:
        return f"{module.name}.weight_packed"
    table = module.storage is Storage.GEMMA and module.kind is Kind.EMBEDDING
    return f"{module.name}.{'embedding_quantized' if table else 'weight'}"


def sample(checkpoint: Checkpoint, count: int) -> list[str]:
    """Integer linear layers spread evenly over the model, at least one of each scheme and shape first."""
    integer = [
        module
        for module in checkpoint.modules.values()
        if isinstance(module.scheme, LinearScheme) and module.scheme.quantize_input
    ]
    kinds: dict[Any, str] = {}
    for module in integer:
        kinds.setdefault((module.scheme, module.shape), module.name)
    chosen = list(kinds.values())[:count]
    rest = [module.name for module in integer if module.name not in set(chosen)]
    missing = min(count - len(chosen), len(rest))
    chosen += [rest[i * len(rest) // missing] for i in range(missing)]
    order = {module.name: i for i, module in enumerate(integer)}
    return sorted(chosen, key=order.__getitem__)


def _inputs(k: int, scale: float, rng: np.random.Generator) -> oracle.Floats:
    """Rows of a few steps, of far past saturation, of exact half steps, and of what is no number."""
    x: oracle.Floats = (rng.normal(size=(ROWS, k)) * scale * np.array([3, 40, 300, 40, 40, 40, 3, 40])[:, None]).astype(
        np.float32
    )
    x[3] = rng.integers(-270, 271, k) * np.float32(scale) / 2
    x[4], x[5] = np.float32(127 * scale), np.float32(-128 * scale)
    x[7, : min(3, k)] = np.array([np.nan, np.inf, -np.inf], np.float32)[: min(3, k)]
    return x


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.to(torch.float32).numpy()


def vendor_refusal(module: QuantizedModule, tensors: QuantizedTensors) -> str | None:
    """Why the vendor's runtime cannot hold a layer; None when it can."""
    scheme, bits = module.scheme, module.scheme.weight.num_bits
    if not isinstance(scheme, LinearScheme) or tensors.input_scale is None or tensors.output_scale is None:
        return "it takes layers with an input and an output scale"
    if module.groups > 1:
        return "it has one scale per output channel"
    if bits not in VENDOR_BITS:
        return f"it has 2, 4 and 8 bits, not {bits}"
    if module.shape[1] * bits % 8:
        return "its delegate takes rows that fill whole bytes"
    scale = tensors.weight_scale.to(torch.float32)
    ratio = tensors.input_scale * scale / tensors.output_scale
    if bool((scale < torch.finfo(torch.float32).tiny).any()) or bool((ratio >= 256).any()):
        return "its delegate takes normal scales that requantize by less than 256"
    bias = _bias_codes(tensors)
    if bits == 4 and bias is not None and int(np.abs(bias.astype(np.int64)).max()) >= VENDOR_INT4_BIAS:
        return "on some processors its 4-bit sums, bias included, wrap at 28 bits"
    return None


def _bias_codes(tensors: QuantizedTensors) -> NDArray[np.int32] | None:
    if tensors.bias is None:
        return None
    unit = _array(tensors.input_scale) * _array(tensors.weight_scale)[:, 0]
    codes: NDArray[np.int32] = np.rint(_array(tensors.bias) / unit).astype(np.int32)
    return codes


def check_layer(checkpoint: Checkpoint, name: str, *, vendor: bool, seed: int = 0) -> LayerCheck:
    """Run one layer and compare it with the oracle and, if wanted, the vendor's runtime."""
    module, tensors = checkpoint.modules[name], checkpoint.read(name, copy=True)
    weight, (n, k) = module.scheme.weight, module.shape
    layer = build_linear(module, tensors)
    assert tensors.input_scale is not None
    rng = np.random.default_rng([seed, n, k])
    x = _inputs(k, float(tensors.input_scale), rng)
    y = layer(torch.from_numpy(x)).numpy()
    stored = codes_name(module)
    codes = stored_codes(checkpoint.file_of(stored), stored, module)
    codes_differ = int((codes != unpack_rows(tensors.rows, weight.num_bits, k).numpy()).sum())
    channels = np.sort(rng.choice(n, min(n, CHANNELS), replace=False))
    s_in, s_out = np.float32(tensors.input_scale), _array(tensors.output_scale)
    s_w, bias = _array(tensors.weight_scale)[channels], _array(tensors.bias)
    expected = oracle.linear(
        x,
        codes[channels],
        s_w,
        s_in,
        None if s_out is None else s_out.reshape(1),
        None if bias is None else bias[channels],
        weight.group_size or 0,
    )
    found = np.ascontiguousarray(y[:, channels])
    check = LayerCheck(name, module.scheme.label, found.size, _bits_differ(found, expected), codes_differ)
    refusal = vendor_refusal(module, tensors) if vendor else "ai-edge-litert is not installed (the litert extra)"
    if refusal is not None:
        return LayerCheck(*_first_five(check), vendor_skipped=refusal)
    from bytelane.report.litert import Graph, NotDelegatedError

    whole = _bias_codes(tensors)
    try:
        part = None if whole is None else whole[channels]
        theirs = Graph(codes[channels], weight.num_bits, s_w[:, 0], s_in, s_out, part, ROWS)(x)
    except NotDelegatedError as error:
        return LayerCheck(*_first_five(check), vendor_skipped=f"its delegate left the layer out: {error}")
    return LayerCheck(*_first_five(check), vendor_differing=_bits_differ(found, theirs))


def _first_five(check: LayerCheck) -> tuple[str, str, int, int, int]:
    return check.name, check.scheme, check.values, check.differing, check.codes_differ


def _bits_differ(a: NDArray[np.float32], b: NDArray[np.float32]) -> int:
    left, right = (np.ascontiguousarray(v, np.float32).view(np.int32) for v in (a, b))
    return int((left != right).sum()) if left.shape == right.shape else left.size


def _notes(name: str, module: QuantizedModule, rows: Tensor, scale: Tensor) -> list[str]:
    """What the format allows and calibration rarely means."""
    found = []
    zeros = int((scale.to(torch.float32) == 0).any(dim=1).sum())
    if zeros:
        found.append(f"{name}: {zeros} channels have a scale of 0")
    if rows.numel() and bool((rows == rows[:1, :1]).all()):
        found.append(f"{name}: every byte of its codes is {int(rows[0, 0])}")
    return found


def verify_checkpoint(
    checkpoint: Checkpoint,
    *,
    samples: int = 8,
    seed: int = 0,
    vendor: bool | None = None,
    progress: Progress | None = None,
) -> CheckpointCheck:
    """Read everything and check a sample of layers.

    Args:
        checkpoint: open.
        samples: layers to run.
        seed: of their inputs.
        vendor: ask LiteRT too; None where it is installed.
        progress: called with the steps done and the steps in all: modules, plain tensors, layers.

    Raises:
        CheckpointError: the class that names the rule a tensor breaks.
    """
    chosen = sample(checkpoint, samples)
    total, done = len(checkpoint.modules) + len(checkpoint.plain) + len(chosen), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    notes: list[str] = []
    for name, module in checkpoint.modules.items():
        tensors = checkpoint.read(name, copy=True)
        notes += _notes(name, module, tensors.rows, tensors.weight_scale)
        step()
    for name in checkpoint.plain:
        values = checkpoint.read_plain(name, copy=True)
        if values.dtype.is_floating_point and not bool(torch.isfinite(values).all()):
            notes.append(f"{name}: holds NaN or infinity")
        step()
    asked = find_spec("ai_edge_litert") is not None if vendor is None else vendor
    layers = []
    for name in chosen:
        layers.append(check_layer(checkpoint, name, vendor=asked, seed=seed))
        step()
    return CheckpointCheck(
        model=str(checkpoint.directory),
        modules=len(checkpoint.modules),
        codes=sum(prod(module.shape) for module in checkpoint.modules.values()),
        plain_tensors=len(checkpoint.plain),
        layers=tuple(layers),
        notes=tuple(notes),
    )


def tflite_of(checkpoint: Checkpoint, name: str, *, rows: int = 1) -> bytes:
    """One layer as a .tflite model, float32 `x` `[rows, in]` to float32 `y` `[rows, out]`, for a phone to run.

    Raises:
        NotRepresentableError: no such layer, one the vendor's runtime cannot hold, or its package is missing.
    """
    if name not in checkpoint.modules:
        raise NotRepresentableError("no such quantized layer", file=checkpoint.directory, tensor=name)
    if find_spec("ai_edge_litert") is None:
        raise NotRepresentableError("writing it needs ai-edge-litert (the litert extra)", tensor=name)
    from bytelane.report.litert import build

    module, tensors = checkpoint.modules[name], checkpoint.read(name)
    refusal = vendor_refusal(module, tensors)
    if refusal is not None:
        raise NotRepresentableError(f"a .tflite cannot hold it: {refusal}", file=checkpoint.directory, tensor=name)
    bits = module.scheme.weight.num_bits
    codes = unpack_rows(tensors.rows, bits, module.shape[1]).numpy()
    s_in, s_out, s_w = (_array(t) for t in (tensors.input_scale, tensors.output_scale, tensors.weight_scale))
    return build(codes, bits, s_w[:, 0], s_in, s_out, _bias_codes(tensors), rows)
