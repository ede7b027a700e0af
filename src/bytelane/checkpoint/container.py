"""The folder: `config.json` and the safetensors files, opened without reading a weight.

Only `*.safetensors` are ever opened as weights, so nothing in a checkpoint can run code. A folder has either one
`model.safetensors`, or `model.safetensors.index.json` whose `weight_map` names the shard of every tensor. Headers are
read at once and all of them are checked against the index; tensors come out of the memory map when they are asked for.
"""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bytelane.checkpoint.types import TensorInfo
from bytelane.errors import (
    CheckpointError,
    FileFormatError,
    OverlappingTensorsError,
    ShardIndexError,
    TensorDtypeError,
    TruncatedFileError,
)
from bytelane.memory import streamed_empty

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes a checkpoint's tensors may have, by their safetensors names."""

_MAX_HEADER_BYTES = 100_000_000
"""The longest header the safetensors format allows."""

_READ_BYTES = 1 << 20
"""Fewer bytes than this are not worth a thread."""

MAX_JSON_BYTES = _MAX_HEADER_BYTES
"""The longest configuration or index that is read: a parser takes some twenty times a file's size in memory."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refusing one that names a key twice: which of the two counts differs between readers."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


def read_json(file: Path, error: type[CheckpointError]) -> dict[str, Any]:
    """A JSON object from a file; `error` is raised when it is not one."""
    if not file.exists():
        raise error("the file does not exist", file=file)
    if not file.is_file():  # opening a pipe would wait for a writer
        raise error("not a file", file=file)
    if file.stat().st_size > MAX_JSON_BYTES:
        raise error(f"at most {MAX_JSON_BYTES} bytes are read as JSON, found {file.stat().st_size}", file=file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"not readable as JSON: {cause}", file=file) from cause
    if not isinstance(found, dict):
        raise error(f"must hold a JSON object, found {type(found).__name__}", file=file)
    return found


def lies_inside(file: Path, directory: Path) -> bool:
    """Whether a file, with its symbolic links followed, is the folder's own.

    The hub cache keeps a snapshot's files as links into the `blobs` folder beside `snapshots`; those are its own too.
    """
    target, home = file.resolve(), directory.resolve()
    if target.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"


class _Span(NamedTuple):
    """A tensor's entry in a safetensors header."""

    begin: int
    stop: int
    name: str
    dtype: str
    shape: list[int]


def _span(name: str, entry: Any) -> _Span:
    """A header's entry; anything that is not one raises one of the errors that `_diagnose` expects."""
    begin, stop = (int(offset) for offset in entry["data_offsets"])
    shape = [int(size) for size in entry["shape"]]
    return _Span(begin, stop, name, str(entry["dtype"]), shape)


def _diagnose(file: Path, cause: SafetensorError) -> FileFormatError:
    """Why safetensors refused a file, found by reading its header once more.

    The library reports one class of error with a text that changes between versions; the rule that is broken follows
    from the header and the file's size.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return TruncatedFileError(f"the header's length takes 8 bytes, the file has {size}", file=file)
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER_BYTES:
            return FileFormatError(f"not a safetensors file: a header of {length} bytes", file=file)
        if 8 + length > size:
            return TruncatedFileError(f"the header ends at byte {8 + length}, the file at {size}", file=file)
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        spans = sorted(_span(name, entry) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        return FileFormatError(f"not a safetensors header: {error}", file=file)
    end = 0
    for begin, stop, name, dtype, shape in spans:
        if begin != end or stop < begin:
            kind = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            return OverlappingTensorsError(f"bytes {begin}..{stop} {kind}, which ends at {end}", file=file, tensor=name)
        if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != stop - begin:
            return OverlappingTensorsError(
                f"{dtype} of shape {shape} does not take the {stop - begin} bytes it has", file=file, tensor=name
            )
        end = stop
    if 8 + length + end > size:
        return TruncatedFileError(f"the last tensor ends at byte {8 + length + end}, the file at {size}", file=file)
    if 8 + length + end < size:
        return OverlappingTensorsError(f"{size - 8 - length - end} bytes after the last tensor", file=file)
    return FileFormatError(f"refused by safetensors: {cause}", file=file)


def _read_into(file: Path, begin: int, data: Tensor) -> int:
    """Fill a tensor of bytes from a place in a file; how many there were."""
    left = data.numpy().data
    with file.open("rb", buffering=0) as stream:
        stream.seek(begin)
        while len(left) and (count := stream.readinto(left)):
            left = left[count:]
    return data.numel() - len(left)


class TensorFiles:
    """The tensors of a checkpoint folder, by name.

    Attributes:
        directory: the folder.
        infos: the header of every tensor.
        source: the file that says which tensors there are: the index, or the one weight file.
    """

    def __init__(self, directory: Path) -> None:
        """Open the folder's safetensors files.

        Raises:
            FileFormatError: no safetensors files, or one of them is malformed (`TruncatedFileError`,
                `OverlappingTensorsError`).
            ShardIndexError: the index and the shards disagree, or the index points outside the folder.
        """
        self.directory = directory
        self.infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, Any] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        index = directory / INDEX_NAME
        weight_map = self._weight_map(index) if index.exists() else None
        self.source = index if weight_map is not None else directory / WEIGHTS_NAME
        if weight_map is None:
            self._require_single()
        for shard in [WEIGHTS_NAME] if weight_map is None else list(dict.fromkeys(weight_map.values())):
            self._open(shard, weight_map)
        for name, shard in (weight_map or {}).items():
            if name not in self.infos:
                raise ShardIndexError(f"the index puts it in {shard}, which does not have it", file=index, tensor=name)

    def _require_single(self) -> None:
        """Refuse a folder that has neither an index nor exactly the one weight file."""
        if not self.directory.is_dir():
            raise FileFormatError(
                "a checkpoint is a folder with config.json and safetensors files", file=self.directory
            )
        found = sorted(p.name for p in self.directory.glob("*.safetensors"))
        if WEIGHTS_NAME in found:
            return
        if found:
            raise ShardIndexError(
                f"neither {WEIGHTS_NAME} nor {INDEX_NAME}, but {', '.join(found[:5])}", file=self.directory
            )
        others = sorted(p.name for p in self.directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise FileFormatError(
            "safetensors only: the folder has no *.safetensors" + (f", but {', '.join(others[:5])}" if others else ""),
            file=self.directory,
        )

    def _weight_map(self, index: Path) -> dict[str, str]:
        """The index's map of tensor to shard, every shard a file of this folder."""
        found = read_json(index, ShardIndexError).get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
            raise ShardIndexError("must map tensor names to file names", file=index, tensor="weight_map")
        for shard in dict.fromkeys(found.values()):
            parts = PurePosixPath(shard)
            if parts.is_absolute() or ".." in parts.parts or "\\" in shard or not shard.endswith(".safetensors"):
                raise ShardIndexError(f"a shard must be a safetensors file of the folder, found {shard!r}", file=index)
            path = self.directory / shard
            if not path.is_file():
                raise ShardIndexError(f"the shard {shard} does not exist", file=index)
            if not lies_inside(path, self.directory):
                raise ShardIndexError(f"the shard {shard} is a link out of the folder", file=index)
        single = self.directory / WEIGHTS_NAME
        if single.exists() and WEIGHTS_NAME not in found.values():
            raise ShardIndexError(f"the folder also has a {WEIGHTS_NAME} that the index does not name", file=index)
        return found

    def _open(self, shard: str, weight_map: dict[str, str] | None) -> None:
        """Map one file and take in its headers."""
        file = self.directory / shard
        if not file.is_file():  # opening a pipe would wait for a writer, and not even Ctrl-C would end that
            raise FileFormatError("not a file", file=file)
        if not lies_inside(file, self.directory):
            raise FileFormatError("a link out of the folder", file=file)
        try:
            handle: Any = safe_open(file, framework="pt")
        except SafetensorError as cause:
            raise _diagnose(file, cause) from cause
        except OSError as cause:
            raise FileFormatError(f"cannot be opened: {cause}", file=file) from cause
        self._handles[shard] = handle
        for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            if weight_map is not None and weight_map.get(name) != shard:
                where = "nowhere" if name not in weight_map else f"in {weight_map[name]}"
                raise ShardIndexError(f"the file has it, the index puts it {where}", file=file, tensor=name)
            part = handle.get_slice(name)
            self.infos[name] = TensorInfo(name, part.get_dtype(), tuple(part.get_shape()), shard)

    def path(self, name: str) -> Path:
        """The file a tensor lies in."""
        return self.directory / self.infos[name].file

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor."""
        info = self.infos[name]
        if info.dtype not in DTYPES:
            raise TensorDtypeError(f"the dtype {info.dtype} is not supported", file=self.path(name), tensor=name)
        return prod(info.shape) * DTYPES[info.dtype].itemsize

    def tensor(self, name: str) -> Tensor:
        """A tensor, as a view of the memory map."""
        if not self._handles:
            raise ValueError("the checkpoint is closed")
        info = self.infos[name]
        try:
            found: Tensor = self._handles[info.file].get_tensor(name)
        except SafetensorError as cause:
            raise FileFormatError(f"cannot be read: {cause}", file=self.path(name), tensor=name) from cause
        return found

    def copy(self, name: str) -> Tensor:
        """A tensor in memory of its own, read past the memory map.

        Pages that are copied out of a map stay resident beside the copy for as long as any tensor of the file is in
        use; read this way, they are in memory once. Large tensors are read by as many threads as torch has, into memory
        for streaming (see `bytelane.memory`).
        """
        info, file = self.infos[name], self.path(name)
        data = streamed_empty((self.nbytes(name),), torch.uint8)
        begin, size = self._begins(info.file)[name], data.numel()
        parts = max(1, min(torch.get_num_threads(), size // _READ_BYTES))
        bounds = [size * i // parts for i in range(parts + 1)]
        if parts == 1:
            done = _read_into(file, begin, data)
        else:
            with ThreadPoolExecutor(parts) as pool:
                reads = [
                    pool.submit(_read_into, file, begin + start, data[start:stop]) for start, stop in pairwise(bounds)
                ]
                done = sum(read.result() for read in reads)
        if done != size:
            raise TruncatedFileError(f"{size} bytes were to be read, {done} are there", file=file, tensor=name)
        return data.view(DTYPES[info.dtype]).reshape(info.shape)

    def _begins(self, shard: str) -> dict[str, int]:
        """Where each tensor of a file begins, from the header that safetensors has checked."""
        if shard not in self._offsets:
            with (self.directory / shard).open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
            self._offsets[shard] = {
                name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
            }
        return self._offsets[shard]

    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""
        self._handles.clear()
