"""From one storage to the other without touching a code or the value of a scale.

Both storages read into and write from the same canonical rows, so a conversion is a copy in other clothes. What the
target has no place for is either a refusal (a module) or named in the report (everything around it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bytelane.checkpoint import gemma
from bytelane.checkpoint.configuration import stored_as
from bytelane.checkpoint.reader import Checkpoint
from bytelane.checkpoint.types import ConversionReport, QuantizedModule, QuantizedTensors
from bytelane.checkpoint.writer import MAX_SHARD_BYTES, write_checkpoint
from bytelane.errors import NotRepresentableError
from bytelane.scheme import LinearScheme, Storage

_LISTED = 5


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _notes(source: Checkpoint, storage: str, *, drop_kv_scales: bool) -> tuple[list[str], list[str]]:
    """What stays the same though it looks different, and what does not come along."""
    kept: list[str] = []
    lost: list[str] = []
    modules = source.modules.values()
    narrow = [m for m in modules if source.read_scales(m.name).weight_scale.dtype != torch.float32]
    if storage == gemma.METHOD and narrow:
        kept.append(
            f"The weight scales of {_count(len(narrow), 'module')} were widened to float32, the one dtype Gemma "
            "storage has for them; their values are the same."
        )
    bare = [
        m
        for m in modules
        if isinstance(m.scheme, LinearScheme) and not (m.scheme.quantize_input and m.scheme.quantize_output)
    ]
    if bare:
        how = "a scale of 0" if storage == gemma.METHOD else "no scale and no activation entry in their group"
        kept.append(f"{_count(len(bare), 'linear')} with a side that is not quantized: written with {how}.")
    bytewise = [m for m in modules if m.storage is Storage.INT_QUANTIZED]
    if storage == gemma.METHOD and bytewise:
        kept.append(
            f"{_count(len(bytewise), 'int-quantized module')} become Gemma's own layout; converted back, they are "
            "pack-quantized with the same codes."
        )
    if source.kv_scales and drop_kv_scales:
        lost.append(
            f"The KV-cache scales of {_count(len(source.kv_scales), 'attention module')} were dropped, as asked."
        )
    elif source.kv_scales:
        kept.append(f"The KV-cache scales of {_count(len(source.kv_scales), 'attention module')}.")
    if source.unused:
        names = ", ".join(source.unused[:_LISTED]) + (", ..." if len(source.unused) > _LISTED else "")
        lost.append(f"{_count(len(source.unused), 'tensor')} the model does not take: {names}.")
    return kept, lost


def convert_checkpoint(
    source: Checkpoint,
    directory: Path | str,
    storage: str,
    *,
    drop_kv_scales: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write a checkpoint in another storage (or anew in its own).

    Codes and the values of scales are copied, never recomputed; converting back gives the same canonical tensors.

    Args:
        source: an open checkpoint.
        directory: the folder to make.
        storage: `"compressed-tensors"` or `"gemma"`.
        drop_kv_scales: leave the KV-cache scales out.
        overwrite: replace a checkpoint that is there.
        max_shard_bytes: begin another file beyond this.
        progress: called with the bytes of tensors taken so far and in all.

    Returns:
        What was written, what was kept in another form, and what the target has no place for.

    Raises:
        NotRepresentableError: the target cannot hold a module; nothing is written.
        CheckpointError: whatever reading or writing refuses.
    """
    for module in source.modules.values():
        try:
            stored_as(module, storage)
        except NotRepresentableError as error:
            raise error.within(source.directory) from error
    kept, lost = _notes(source, storage, drop_kv_scales=drop_kv_scales)
    total, done = source.total_bytes, 0

    def taken(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    def modules() -> Iterator[tuple[QuantizedModule, QuantizedTensors]]:
        for module in source.modules.values():
            yield module, source.read(module.name)
            taken(source.stored_bytes(module.name))

    def plain() -> Iterator[tuple[str, Tensor]]:
        for name in source.plain:
            yield name, source.read_plain(name)
            taken(source.plain_bytes(name))

    write_checkpoint(
        directory,
        config=source.config,
        storage=storage,
        modules=modules(),
        plain=plain(),
        kv_scales={} if drop_kv_scales else source.kv_scales,
        unquantized=source.ignored,
        tied=source.tied,
        copy_from=source.directory,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )
    return ConversionReport(modules=len(source.modules), tensors=len(source.plain), kept=tuple(kept), lost=tuple(lost))
