"""What an observation has seen so far, in a file, so that a calibration that was killed goes on where it was.

The file is safetensors: the histograms' occupied bins as two tensors, everything else as JSON in its header. It says
which model, text and recipe it is of, and is refused for any other.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bytelane.errors import QuantizeError
from bytelane.quantize.observe import NUM_BINS, Observer, Statistics

_HEAD = 4096
"""Values of each parameter that identify it."""


class ResumeError(QuantizeError):
    """A file of observations that is of something else, or is none."""


def fingerprint(model: nn.Module, windows: Sequence[Tensor], *settings: object) -> str:
    """SHA-256 of the head of every parameter, every token, and what else decides an observation.

    Args:
        model: the model that is observed.
        windows: int64 `[length]` token ids each.
        settings: values whose `repr` says all of them.
    """
    found = hashlib.sha256(repr(settings).encode())
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:_HEAD].to("cpu", torch.float32)
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + head.numpy().tobytes())
    for window in windows:
        found.update(window.cpu().numpy().tobytes() + b"|")
    return found.hexdigest()


class ObservationFile:
    """An observation's file: read at the start, written now and then.

    Args:
        file: where it is, or will be.
        of: what the observation is of: see `fingerprint`.
        seconds: at least this long between two writings; a killed process loses no more than that.
    """

    def __init__(self, file: Path, of: str, *, seconds: float = 30.0) -> None:
        self._file = file
        self._of = of
        self._seconds = seconds
        self._windows = 0
        self._written = 0
        self._at = time.monotonic()

    def load(self, observer: Observer) -> int:
        """Give the observer what the file holds; returns of how many windows.

        Raises:
            ResumeError: the file is of something else.
        """
        self._windows = self._written = load_observer(observer, self._file, self._of)
        return self._windows

    def seen(self, observer: Observer, windows: int) -> None:
        """Count the windows read, and write if it is time."""
        self._windows = windows
        if time.monotonic() - self._at >= self._seconds:
            self.save(observer)

    def save(self, observer: Observer) -> None:
        """Write what the observer has, unless that is written."""
        if self._windows > self._written:
            save_observer(observer, self._windows, self._file, self._of)
            self._written = self._windows
        self._at = time.monotonic()


def save_observer(observer: Observer, windows: int, file: Path, of: str) -> None:
    """Write what was seen in the windows so far: all of it, or the file stays as it was."""
    records: list[dict[str, Any]] = []
    bins: list[Tensor] = []
    counts: list[Tensor] = []
    for side, names, statistics in _held(observer):
        record: dict[str, Any] = {"side": side, "names": list(names), "count": statistics.count, "bins": None}
        record["low"], record["high"] = statistics.low.hex(), statistics.high.hex()
        if statistics.histogram is not None:
            used = statistics.histogram.nonzero().flatten()
            record["bins"] = used.numel()
            bins.append(used.to(torch.int32))
            counts.append(statistics.histogram[used])
        records.append(record)
    header = {
        "of": of,
        "windows": str(windows),
        "tokens": str(observer.tokens),
        "statistics": json.dumps(records),
    }
    tensors = {
        "bins": torch.cat([torch.zeros(0, dtype=torch.int32), *bins]),
        "counts": torch.cat([torch.zeros(0, dtype=torch.int64), *counts]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        save_file(tensors, partial, metadata=header)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_observer(observer: Observer, file: Path, of: str) -> int:
    """Take in what a file holds.

    Args:
        observer: of the same layers; nothing seen yet.
        file: written by `save_observer`.
        of: what it must be of: see `fingerprint`.

    Returns:
        How many windows it has seen: 0 where there is no such file.

    Raises:
        ResumeError: the file is none of `save_observer`'s, or of another model, text or recipe.
    """
    if not file.exists():
        return 0
    try:
        with safe_open(file, framework="pt") as held:
            header = held.metadata() or {}
            bins, counts = held.get_tensor("bins").to(torch.int64), held.get_tensor("counts")
        found_of, windows, tokens = header["of"], int(header["windows"]), int(header["tokens"])
        records = json.loads(header["statistics"])
        restored = [(r["side"], tuple(r["names"]), s) for r, s in _restored(records, bins, counts)]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ResumeError(f"{file}: no file of observations: {error!r}; give another name") from error
    if found_of != of:
        raise ResumeError(
            f"{file}: its observations are of another model, text or recipe; give another name, or remove it to "
            f"observe anew"
        )
    try:
        for side, names, statistics in restored:
            observer.take(side, names, statistics)
    except ValueError as error:
        raise ResumeError(f"{file}: {error}; give another name, or remove it to observe anew") from error
    observer.tokens = tokens
    return windows


def _held(observer: Observer) -> Iterator[tuple[str, tuple[str, ...], Statistics]]:
    yield from (("input", readers, statistics) for readers, statistics in observer.by_readers.items())
    yield from (("output", (name,), statistics) for name, statistics in observer.outputs.items())


def _restored(
    records: Sequence[dict[str, Any]], bins: Tensor, counts: Tensor
) -> Iterator[tuple[dict[str, Any], Statistics]]:
    start = 0
    for record in records:
        histogram = None
        if record["bins"] is not None:
            stop = start + int(record["bins"])
            histogram = torch.zeros(NUM_BINS, dtype=torch.int64)
            histogram[bins[start:stop]] = counts[start:stop]
            start = stop
        low, high = float.fromhex(record["low"]), float.fromhex(record["high"])
        yield record, Statistics(low, high, int(record["count"]), histogram)
    if start != bins.numel():
        raise ValueError(f"{bins.numel()} bins where {start} are said to be")
