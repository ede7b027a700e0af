"""Writing a checkpoint: all of it or nothing.

Tensors stream through, one shard in memory at a time, into a folder beside the target. Only when every file is complete
and on the disk is the folder renamed into place, so an interrupted or refused write leaves what was there before.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bytelane.checkpoint import compressed, gemma
from bytelane.checkpoint.configuration import STORAGES, compressed_config, gemma_config, stored_as
from bytelane.checkpoint.container import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, lies_inside
from bytelane.checkpoint.exchange import replace_folder, staging_folder
from bytelane.checkpoint.rows import stored_kv_scales, stored_tensors
from bytelane.checkpoint.types import KVScales, QuantizedModule, QuantizedTensors
from bytelane.errors import (
    CheckpointError,
    ConfigError,
    FileFormatError,
    OutputExistsError,
    PackedShapeError,
    ScaleError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedTensorError,
    UnknownMethodError,
)
from bytelane.scheme import Kind, LinearScheme, row_bytes
from bytelane.validation import activation_scale, check_full_length_rows, check_integer_form, weight_scales

MAX_SHARD_BYTES = 2 * 1024**3

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
COPIED_STEMS = ("LICENSE", "NOTICE")
NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".safetensors")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Shards:
    """Collects tensors and writes a safetensors file whenever enough of them have come together."""

    def __init__(self, directory: Path, max_bytes: int, progress: Callable[[int], None] | None) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.progress = progress
        self.files: list[list[str]] = []
        self.names: set[str] = set()
        self.total = 0
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.names:
            raise UnexpectedTensorError("written twice", tensor=name)
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self.names.add(name)
        self.pending[name] = tensor.detach().cpu().contiguous()
        self.pending_bytes += tensor.nbytes

    def _path(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.safetensors"

    def _flush(self) -> None:
        path = self._path(len(self.files))
        try:
            save_file(self.pending, path, metadata={"format": "pt"})
        except SafetensorError as cause:  # its own class even for a full disk
            found = re.search(r"os error (\d+)", str(cause))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, os.strerror(code) if found else str(cause), str(path)) from cause
        _sync(path)
        self.files.append(list(self.pending))
        self.total += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0
        if self.progress is not None:
            self.progress(self.total)

    def finish(self) -> None:
        """Write the last shard, give all their final names and write the index if there are several."""
        if self.pending or not self.files:
            self._flush()
        count = len(self.files)
        if count == 1:
            self._path(0).rename(self.directory / WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.files):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.directory / INDEX_NAME, index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _copy_small_files(source: Path, target: Path) -> None:
    """Copy what goes along with the weights: tokenizer, generation configuration, chat templates, licence.

    Only known kinds of files, so never code and never weights of any format; the configuration and the index are
    written anew.
    """
    for path in sorted([*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]):
        name = path.name
        wanted = path.suffix in COPIED_SUFFIXES or path.stem in COPIED_STEMS
        skipped = name == CONFIG_NAME or name.endswith(".index.json") or name.startswith(".")
        if not wanted or skipped or path.suffix in NEVER_COPIED or not path.is_file():
            continue
        if not lies_inside(path, source):
            raise FileFormatError("a link out of the folder is not copied", file=path)
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        _sync(copy)


def _check(module: QuantizedModule, tensors: QuantizedTensors) -> None:
    """Refuse to write what could not be read back."""
    rows, columns = module.shape
    width = row_bytes(columns, module.scheme.weight.num_bits)
    if tensors.rows.dtype != torch.uint8 or tuple(tensors.rows.shape) != (rows, width):
        raise PackedShapeError(
            f"rows must be uint8 [{rows}, {width}], found {tuple(tensors.rows.shape)} of {tensors.rows.dtype}",
            tensor="rows",
        )
    if tensors.weight_scale.dtype not in _FLOATS:
        raise TensorDtypeError(
            f"must be float32, bfloat16 or float16, found {tensors.weight_scale.dtype}", tensor="weight_scale"
        )
    scale = weight_scales(tensors.weight_scale, rows, module.groups, "weight_scale")
    if scale.dim() != tensors.weight_scale.dim():
        raise TensorShapeError(f"must be [{rows}, {module.groups}], found [{rows}]", tensor="weight_scale")
    linear = module.scheme if isinstance(module.scheme, LinearScheme) else None
    sides = (
        ("input_scale", tensors.input_scale, linear is not None and linear.quantize_input),
        ("output_scale", tensors.output_scale, linear is not None and linear.quantize_output),
    )
    for leaf, value, wanted in sides:
        if (activation_scale(value, leaf) is not None) != wanted:
            raise ScaleError(f"the scheme says quantized: {wanted}, the tensors say otherwise", tensor=leaf)
        if value is not None and value.dtype != torch.float32:
            raise TensorDtypeError(f"must be float32, found {value.dtype}", tensor=leaf)
    if (tensors.bias is not None) != module.bias:
        raise TensorShapeError(f"the module says bias: {module.bias}, the tensors say otherwise", tensor="bias")
    if tensors.bias is not None and (tensors.bias.dtype not in _FLOATS or tuple(tensors.bias.shape) != (rows,)):
        raise TensorShapeError(f"must be float [{rows}], found {tuple(tensors.bias.shape)}", tensor="bias")
    if module.kind is Kind.LINEAR:
        weight = module.scheme.weight
        check_full_length_rows(tensors.rows, weight.num_bits, columns)
        check_integer_form(weight, columns, scale, tensors.input_scale, tensors.output_scale, tensors.bias)


def _write_tensors(
    shards: _Shards,
    storage: str,
    modules: Iterable[tuple[QuantizedModule, QuantizedTensors]],
    plain: Iterable[tuple[str, Tensor]],
    kv_scales: Mapping[str, KVScales],
) -> list[QuantizedModule]:
    """Stream all tensors into the shards; returns the modules that passed."""
    written: list[QuantizedModule] = []
    for module, tensors in modules:
        try:
            _check(module, tensors)
        except CheckpointError as error:
            raise error.within(None, module.name) from error
        for name, tensor in stored_tensors(module, tensors, stored_as(module, storage)):
            shards.add(name, tensor)
        written.append(module)
    for name, tensor in plain:
        shards.add(name, tensor)
    leaves, shape = (compressed.KV_LEAVES, (1,)) if storage == compressed.METHOD else (gemma.KV_LEAVES, ())
    for name, scales in kv_scales.items():
        if any(activation_scale(value, name) is None for value in (scales.k, scales.v)):
            raise ScaleError("KV-cache scales must be positive", tensor=name)
        for leaf, tensor in stored_kv_scales(name, scales, leaves, shape):
            shards.add(leaf, tensor)
    return written


def _check_names(written: Sequence[QuantizedModule], left: Sequence[str], tied: Mapping[str, str]) -> None:
    """Refuse a module that is both quantized and not, and a tie to a module that is not written."""
    names = {module.name for module in written}
    for name in left:
        if name in names:
            raise ConfigError("the module is both quantized and left out", tensor=name)
    for name, source in tied.items():
        if source not in names:
            raise ConfigError(f"tied to {source}, which is not written", tensor=name)


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds anything, unless it is a checkpoint that may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError("exists and is not a folder", file=target)
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError("the folder exists and is not empty", file=target)
    if not (target / CONFIG_NAME).is_file():
        raise OutputExistsError(f"not overwritten: without a {CONFIG_NAME} it is no checkpoint", file=target)


def write_checkpoint(
    directory: Path | str,
    *,
    config: Mapping[str, Any],
    storage: str,
    modules: Iterable[tuple[QuantizedModule, QuantizedTensors]],
    plain: Iterable[tuple[str, Tensor]],
    kv_scales: Mapping[str, KVScales] | None = None,
    unquantized: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    copy_from: Path | str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a checkpoint, completely or not at all.

    Args:
        directory: the folder to make. Its parents are made too.
        config: the model's config.json; its `quantization_config` is replaced.
        storage: `"compressed-tensors"` or `"gemma"`.
        modules: the quantized modules with their tensors; may be a generator, taken once and in order.
        plain: the other tensors by name; may be a generator.
        kv_scales: static KV-cache scales by attention module.
        unquantized: names of the linear and embedding modules that are not among `modules`.
        tied: modules without tensors of their own and the module whose codes they share.
        copy_from: a checkpoint folder whose small files (tokenizer, generation configuration, chat templates, licence)
            go along. Code and weights never do.
        overwrite: replace a checkpoint that is there. A folder that is no checkpoint is never replaced.
        max_shard_bytes: begin another file beyond this; also what is held in memory.
        progress: called with the bytes written so far, after each file.

    Returns:
        The folder.

    Raises:
        OutputExistsError: the folder exists and is not empty.
        NotRepresentableError: the storage has no place for a module.
        CheckpointError: a tensor that could not be read back, under the class that names the rule.
    """
    if storage not in STORAGES:
        raise UnknownMethodError(f"must be {' or '.join(STORAGES)}, found {storage}", tensor="storage")
    target = Path(directory).expanduser().resolve()
    _check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staging_folder(target) as staged:
            shards = _Shards(staged, max_shard_bytes, progress)
            written = _write_tensors(shards, storage, modules, plain, dict(kv_scales or {}))
            left = [*unquantized, *(tied or {})]
            _check_names(written, left, tied or {})
            quantization = (
                compressed_config(written, left, kv_scales=bool(kv_scales))
                if storage == compressed.METHOD
                else gemma_config(written, left)
            )
            shards.finish()
            if copy_from is not None:
                _copy_small_files(Path(copy_from), staged)
            _write_json(staged / CONFIG_NAME, {**config, "quantization_config": quantization})
            for weights in staged.glob("*.safetensors"):
                # safetensors makes its files private; a checkpoint is as readable as the user's other files
                weights.chmod(stat.S_IMODE((staged / CONFIG_NAME).stat().st_mode))
            _sync(staged)
            replace_folder(staged, target)
            _sync(target.parent)
    except CheckpointError as error:
        raise error.within(target) from error
    return target
