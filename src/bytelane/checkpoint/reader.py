"""Opening a checkpoint: the configuration, the model and the files must agree on every tensor.

Nothing is loaded to find out. Headers give names, dtypes and shapes; the scales, which are small, are read and checked;
codes stay on the disk until `Checkpoint.read`. A checkpoint that opens is complete: every tensor of the model is there,
and every tensor of the files has a place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from bytelane.checkpoint import compressed, gemma
from bytelane.checkpoint.container import CONFIG_NAME, DTYPES, TensorFiles, read_json
from bytelane.checkpoint.layout import Layout, ModuleLayout, Skeleton
from bytelane.checkpoint.rows import read_rows
from bytelane.checkpoint.types import KVScales, ModuleScales, QuantizedModule, QuantizedTensors, TensorInfo
from bytelane.errors import (
    AsymmetricError,
    CheckpointError,
    ConfigError,
    GroupSizeError,
    MissingTensorError,
    PackedShapeError,
    ScaleError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
    UnknownMethodError,
    WeightShapeError,
)
from bytelane.memory import streamed
from bytelane.packing import stored_shape
from bytelane.scheme import EmbeddingScheme, Kind, LinearScheme, Storage, WeightScheme
from bytelane.validation import activation_scale, check_full_length_rows, check_integer_form, weight_scales

FLOATS = ("F32", "BF16", "F16")

_LISTED = 5
"""Names an error lists before it says how many more there are."""


def _codes_dtype(layout: ModuleLayout) -> str:
    """The dtype of a module's stored codes."""
    if layout.storage is Storage.PACK_QUANTIZED:
        return "I32"
    return "U8" if layout.storage is Storage.GEMMA and layout.num_bits < 8 else "I8"


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _located(file: Path, prefix: str | None = None) -> Iterator[None]:
    """Fill in the file, and the module's name, of a refusal that does not know them."""
    try:
        yield
    except CheckpointError as error:
        if error.file is not None:
            raise
        raise error.within(file, prefix) from error


@dataclass(frozen=True)
class _Entry:
    """One quantized module with everything read so far."""

    module: QuantizedModule
    layout: ModuleLayout
    scales: ModuleScales


class Checkpoint:
    """An opened checkpoint: described and checked, its weights still on the disk.

    Attributes:
        directory: the folder.
        config: `config.json` as it is.
        storage_name: `"compressed-tensors"` or `"gemma"`.
        modules: the quantized modules by name, in the model's order.
        plain: the tensors that are not quantized, by name, in the model's order.
        kv_scales: static KV-cache scales by attention module.
        tied: modules without tensors of their own that share a quantized module's codes: name to name.
        ignored: linear and embedding modules left unquantized.
        linears: all linear modules, quantized or not.
        unused: tensors of the files that the model class says it does not take.
        skipped: tensors of the files that belong to parts left out of the model; never read.
    """

    def __init__(
        self,
        *,
        config: dict[str, Any],
        storage_name: str,
        files: TensorFiles,
        entries: Mapping[str, _Entry],
        plain: Mapping[str, TensorInfo],
        kv_scales: Mapping[str, KVScales],
        tied: Mapping[str, str],
        ignored: tuple[str, ...],
        linears: tuple[str, ...],
        unused: tuple[str, ...],
        skipped: tuple[str, ...] = (),
    ) -> None:
        self.directory = files.directory
        self.config = config
        self.storage_name = storage_name
        self.modules = {name: entry.module for name, entry in entries.items()}
        self.plain = dict(plain)
        self.kv_scales = dict(kv_scales)
        self.tied = dict(tied)
        self.ignored = ignored
        self.linears = linears
        self.unused = unused
        self.skipped = skipped
        self._files = files
        self._entries = MappingProxyType(dict(entries))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""
        self._files.close()

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors the model takes, scales included."""
        return sum(self.plain_bytes(n) for n in self.plain) + sum(self.stored_bytes(n) for n in self.modules)

    def plain_bytes(self, name: str) -> int:
        """Stored bytes of an unquantized tensor."""
        return self._files.nbytes(name)

    def stored_bytes(self, name: str) -> int:
        """Stored bytes of a quantized module's tensors: codes, scales and bias."""
        names = self._entries[name].layout.tensors
        return sum(self._files.nbytes(n) for n in names if n in self._files.infos)

    def file_of(self, name: str) -> Path:
        """The file a tensor of the checkpoint lies in."""
        return self._files.path(name)

    def read_scales(self, name: str) -> ModuleScales:
        """The scales of a quantized module, which were read and checked when the checkpoint was opened."""
        return self._entries[name].scales

    def read(self, name: str, *, copy: bool = False) -> QuantizedTensors:
        """The tensors of a quantized module in canonical form.

        Rows are a view of the memory map wherever the stored bytes are the canonical bytes: Gemma at 2 and 4 bits, and
        pack-quantized where a row fills its last word.

        Args:
            name: a key of `modules`.
            copy: give rows and scales memory of their own, for streaming, without touching the map.

        Returns:
            rows uint8 `[out, ceil(in * N / 8)]`, weight scales `[out, groups]` in the stored dtype, activation scales
            float32 `[]` or None, bias `[out]` or None.

        Raises:
            CodeRangeError: int8 codes that do not fit N bits.
            AccumulatorError: a bias that could overflow the accumulator.
            KeyError: no such quantized module.
        """
        entry = self._entries[name]
        layout, scales = entry.layout, entry.scales
        bias = None if layout.bias is None else self._files.tensor(layout.bias)
        with _located(self._files.path(layout.weight), name):
            stored = self._files.copy(layout.weight) if copy else self._files.tensor(layout.weight)
            rows = read_rows(stored, layout, owned=copy)
            if copy and rows.data_ptr() != stored.data_ptr():
                rows = streamed(rows)
            if layout.kind is Kind.LINEAR:
                check_full_length_rows(rows, layout.num_bits, layout.shape[1])
                check_integer_form(
                    entry.module.scheme.weight,
                    layout.shape[1],
                    scales.weight_scale,
                    scales.input_scale,
                    scales.output_scale,
                    bias,
                )
        weight_scale = scales.weight_scale.clone() if copy else scales.weight_scale
        return QuantizedTensors(rows, weight_scale, scales.input_scale, scales.output_scale, bias)

    def read_plain(self, name: str, *, copy: bool = False) -> Tensor:
        """An unquantized tensor, as a view of the memory map.

        Args:
            name: a key of `plain`.
            copy: in memory of its own instead.

        Raises:
            KeyError: no such unquantized tensor.
        """
        stored = self.plain[name].name
        return self._files.copy(stored) if copy else self._files.tensor(stored)


def open_checkpoint(
    directory: Path | str, skeleton: torch.nn.Module, *, whole: torch.nn.Module | None = None
) -> Checkpoint:
    """Open a checkpoint and hold it against the model it is for.

    Args:
        directory: the folder with config.json and the safetensors files.
        skeleton: the model without weights (parameters on the meta device), built from the same config.json.
        whole: the model the files are of, where `skeleton` leaves parts of it out (the vision tower of a model that
            is to read text only). Tensors that only those parts have are skipped: neither read nor required.

    Returns:
        The checkpoint, with all scales checked and no weight read.

    Raises:
        CheckpointError: the class that names the broken rule: FORMAT.md lists them.
    """
    folder = Path(directory)
    file = folder / CONFIG_NAME
    config = read_json(file, ConfigError)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise UnknownMethodError(
            "the model is not quantized: there is no such object", file=file, tensor="quantization_config"
        )
    method = quantization.get("quant_method")
    if method not in (compressed.METHOD, gemma.METHOD):
        raise UnknownMethodError(
            f"must be {compressed.METHOD} or {gemma.METHOD}, found {method}",
            file=file,
            tensor="quantization_config.quant_method",
        )
    describe = compressed.describe if method == compressed.METHOD else gemma.describe
    files = TensorFiles(folder)
    parts = None if whole is None else Skeleton.of(whole)
    return _Opening(files, Skeleton.of(skeleton), parts).open(config, str(method), describe, quantization)


class _Opening:
    """The state of one `open_checkpoint`: which tensors have found their place."""

    def __init__(self, files: TensorFiles, skeleton: Skeleton, whole: Skeleton | None) -> None:
        self.files = files
        self.skeleton = skeleton
        self.whole = whole
        self.claimed: set[str] = set()

    def open(self, config: dict[str, Any], method: str, describe: Any, quantization: dict[str, Any]) -> Checkpoint:
        file = self.files.directory / CONFIG_NAME
        shared = self._shared()
        layout: Layout = describe(quantization, self.skeleton, frozenset(shared), file)
        entries = {module.name: self._entry(module) for module in layout.modules}
        kv_scales = self._kv_scales(layout)
        plain = self._plain(entries)
        skipped = self._skipped(describe, quantization)
        unused = self._leftovers()
        tied = {name: source for name, source in shared.items() if source in entries}
        return Checkpoint(
            config=config,
            storage_name=method,
            files=self.files,
            entries=entries,
            plain=plain,
            kv_scales=kv_scales,
            tied=tied,
            ignored=tuple(n for n in self.skeleton.quantizable if n not in entries and n not in tied),
            linears=tuple(n for n in self.skeleton.quantizable if self.skeleton.kind(n) is Kind.LINEAR),
            unused=unused,
            skipped=skipped,
        )

    def _skipped(self, describe: Any, quantization: dict[str, Any]) -> tuple[str, ...]:
        """Tensors of the files that only the parts left out of the model have, by the names the whole model gives.

        Exactly the names the whole model would claim: a tensor that it has no place for either stays unknown.
        """
        if self.whole is None:
            return ()
        layout: Layout = describe(quantization, self.whole, frozenset(), self.files.directory / CONFIG_NAME)
        known = set(self.whole.tensors)
        for module in layout.modules:
            known.difference_update(module.replaced)
        for module in layout.modules:
            if module.name not in self.skeleton.modules:
                known.update(module.tensors)
        known.difference_update(self.skeleton.tensors)
        skipped = tuple(name for name in self.files.infos if name in known and name not in self.claimed)
        self.claimed.update(skipped)
        return skipped

    def _shared(self) -> dict[str, str]:
        """Tied modules of which the files hold no weight of their own."""
        owners = {name.rpartition(".")[0] for name in self.files.infos if not name.endswith(".bias")}
        return {name: source for name, source in self.skeleton.tied_modules().items() if name not in owners}

    def _claim(self, name: str, dtypes: tuple[str, ...], what: str) -> TensorInfo:
        """A tensor that must be there, with one of the dtypes its role may have."""
        info = self.files.infos.get(name)
        if info is None:
            raise MissingTensorError(f"the {what} is missing", file=self.files.source, tensor=name)
        if info.dtype not in dtypes:
            raise TensorDtypeError(
                f"the {what} must be {' or '.join(dtypes)}, found {info.dtype}", file=self.files.path(name), tensor=name
            )
        self.claimed.add(name)
        return info

    def _entry(self, layout: ModuleLayout) -> _Entry:
        """Check one quantized module and read its scales."""
        layout = self._settled(layout)
        columns = layout.shape[1]
        self._check_codes(layout)
        info = self._claim(layout.scale, ("F32",) if layout.storage is Storage.GEMMA else FLOATS, "weight scale")
        with _located(self.files.path(layout.scale)):
            weight = WeightScheme(layout.num_bits, self._group_size(layout, info))
        with _located(self.files.directory / CONFIG_NAME, layout.name):
            groups = weight.groups(columns)
        with _located(self.files.path(layout.scale)):
            scale = weight_scales(self.files.tensor(layout.scale), layout.shape[0], groups, layout.scale)
        if groups == 1:
            weight = WeightScheme(layout.num_bits)
        input_scale = self._activation(layout.input_scale, layout)
        output_scale = self._activation(layout.output_scale, layout)
        scheme: LinearScheme | EmbeddingScheme = EmbeddingScheme(weight)
        if layout.kind is Kind.LINEAR:
            scheme = LinearScheme(weight, input_scale is not None, output_scale is not None)
            with _located(self.files.path(layout.scale), layout.name):
                check_integer_form(weight, columns, scale, input_scale, output_scale, None)
        if layout.bias is not None:
            self._check_shape(self._claim(layout.bias, FLOATS, "bias"), (layout.shape[0],))
        module = QuantizedModule(
            layout.name, layout.kind, layout.shape, scheme, layout.storage, layout.bias is not None
        )
        return _Entry(module, layout, ModuleScales(scale, input_scale, output_scale))

    def _check_shape(
        self, info: TensorInfo, *allowed: tuple[int, ...], error: type[TensorShapeError] | None = None
    ) -> None:
        if info.shape not in allowed:
            raise (error or TensorShapeError)(
                f"must be {' or '.join(str(list(s)) for s in allowed)}, found {list(info.shape)}",
                file=self.files.path(info.name),
                tensor=info.name,
            )

    def _settled(self, layout: ModuleLayout) -> ModuleLayout:
        """The layout with the other width, where the configuration can be read both ways and the codes fit that."""
        info = self.files.infos.get(layout.weight)
        if layout.other_bits is None or info is None:
            return layout
        other = replace(layout, num_bits=layout.other_bits, other_bits=None)
        fits = info.dtype == _codes_dtype(other) and info.shape in stored_shape(
            *other.shape, other.num_bits, other.storage
        )
        return other if fits else layout

    def _check_codes(self, layout: ModuleLayout) -> None:
        """The codes' dtype and shape, and the tensor that repeats the dense shape."""
        dtype = _codes_dtype(layout)
        info = self._claim(layout.weight, (dtype,), f"tensor of {layout.num_bits}-bit codes")
        if layout.weight_shape is not None:
            self._check_shape(self._claim(layout.weight_shape, ("I64",), "weight shape"), (2,), error=WeightShapeError)
            found = self.files.tensor(layout.weight_shape).tolist()
            if tuple(found) != layout.shape:
                raise WeightShapeError(
                    f"must be the model's {list(layout.shape)}, found {found}",
                    file=self.files.path(layout.weight_shape),
                    tensor=layout.weight_shape,
                )
        allowed = stored_shape(*layout.shape, layout.num_bits, layout.storage)
        self._check_shape(info, *allowed, error=TensorShapeError if dtype == "I8" else PackedShapeError)

    def _group_size(self, layout: ModuleLayout, scale: TensorInfo) -> int | None:
        """The configuration's group size, or what the scale's second dimension says where that decides."""
        if not layout.groups_from_scale:
            return layout.group_size
        columns = layout.shape[1]
        if len(scale.shape) != 2 or scale.shape[1] == 0 or columns % scale.shape[1]:
            raise GroupSizeError(
                f"must be [{layout.shape[0]}, groups] with groups that divide {columns}, found {list(scale.shape)}",
                tensor=layout.scale,
            )
        return None if scale.shape[1] == 1 else columns // scale.shape[1]

    def _activation(self, name: str | None, layout: ModuleLayout) -> Tensor | None:
        """A static activation scale as float32 `[]`; None when it is absent or 0."""
        if name is None or (layout.optional_activations and name not in self.files.infos):
            return None
        return self._scale(name, "activation scale")

    def _scale(self, name: str, what: str) -> Tensor | None:
        """A scale of one element as float32 `[]`; None when it is 0. Its value must be a float32."""
        info = self._claim(name, (*FLOATS, "F64"), what)
        self._check_shape(info, (), (1,))
        tensor = self.files.tensor(name)
        if info.dtype == "F64" and not bool(torch.isclose(tensor.float().double(), tensor, 0, 0, equal_nan=True).all()):
            raise TensorDtypeError("the value is not a float32", file=self.files.path(name), tensor=name)
        with _located(self.files.path(name)):
            return activation_scale(tensor, name)

    def _kv_scales(self, layout: Layout) -> dict[str, KVScales]:
        """The KV-cache scales, by attention module, in the model's order."""
        if layout.kv_leaves is None:
            return {}
        found: dict[str, KVScales] = {}
        split = (name.rpartition(".") for name in self.files.infos)
        owners = {owner for owner, _, leaf in split if leaf in layout.kv_leaves}
        for owner in (n for n, _ in self.skeleton.model.named_modules() if n in owners):
            names = [f"{owner}.{leaf}" for leaf in layout.kv_leaves]
            k, v = (self._scale(n, "KV-cache scale") for n in names)
            if (k is None) != (v is None):
                raise ScaleError(
                    "one of the two KV-cache scales is 0, the other is not",
                    file=self.files.path(names[0]),
                    tensor=owner,
                )
            if k is not None and v is not None:
                found[owner] = KVScales(float(k), float(v))
        if layout.kv_required and not found:
            raise MissingTensorError(
                "kv_cache_scheme needs KV-cache scales, no attention module has any",
                file=self.files.source,
                tensor=f"*.{layout.kv_leaves[0]}",
            )
        return found

    def _plain(self, entries: Mapping[str, _Entry]) -> dict[str, TensorInfo]:
        """The model's tensors that are not quantized."""
        replaced = {leaf for entry in entries.values() for leaf in entry.layout.replaced}
        plain: dict[str, TensorInfo] = {}
        missing: list[str] = []
        for name, wanted in self.skeleton.tensors.items():
            if name in replaced:
                continue
            info = self.files.infos.get(name)
            if info is None:
                optional = name in self.skeleton.buffers and any(p.search(name) for p in self.skeleton.optional)
                if name not in self.skeleton.tied and not optional:
                    missing.append(name)
                continue
            same = DTYPES.get(info.dtype) == wanted.dtype
            if not same and not (wanted.dtype.is_floating_point and info.dtype in FLOATS):
                raise TensorDtypeError(
                    f"must be {wanted.dtype}, found {info.dtype}", file=self.files.path(name), tensor=name
                )
            self._check_shape(info, tuple(wanted.shape))
            self.claimed.add(name)
            plain[name] = info
        if missing:
            raise MissingTensorError(
                "the model needs it and the checkpoint does not have it", file=self.files.source, tensor=_some(missing)
            )
        return plain

    def _leftovers(self) -> tuple[str, ...]:
        """Refuse tensors without a place; return those the model class says it ignores."""
        left = [name for name in self.files.infos if name not in self.claimed]
        unused = [name for name in left if any(p.search(name) for p in self.skeleton.ignored)]
        unknown = [name for name in left if name not in set(unused)]
        zero_points = [name for name in unknown if name.endswith(compressed.ZERO_POINT_SUFFIX)]
        if zero_points:
            raise AsymmetricError(
                "the scheme has no zero points", file=self.files.path(zero_points[0]), tensor=_some(zero_points)
            )
        if unknown:
            raise UnexpectedTensorError(
                "neither the model nor its quantization has a place for it",
                file=self.files.path(unknown[0]),
                tensor=_some(unknown),
            )
        return tuple(unused)
