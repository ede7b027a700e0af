"""Tables for people, JSON for programs, progress for both to ignore.

Results go to standard output. Progress and remarks go to standard error, and progress is shown on a terminal only.
"""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a hub id, or bytelane:small.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
NumericsOption = Annotated[
    str,
    typer.Option(
        help="**integer**: what the phone computes. **emulated**: the float emulation of vLLM and Hugging Face."
    ),
]
KVCacheOption = Annotated[
    str,
    typer.Option(
        help="Keys and values as **int8** codes or in **float**; **auto**: int8 in integer numerics where the "
        "checkpoint has the scales."
    ),
]
FloatOpsOption = Annotated[
    str,
    typer.Option(
        help="What lies between the layers by **native** kernels or by **torch**; **auto**: native in integer numerics "
        "on the CPU where the architecture has it."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Activation dtype: float32, bfloat16 or float16. The checkpoint's own by default."),
]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice by default.")]
OverridesOption = Annotated[
    Path | None,
    typer.Option(
        "--overrides",
        metavar="FILE",
        help="Scales the checkpoint lacks: JSON of layer names or patterns to `input_scale`, `output_scale` and, for a "
        "weight stored in float, `num_bits`.",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code in the checkpoint to run. Off by default.")
]


def remarks() -> Console:
    """The console for progress and remarks."""
    return Console(stderr=True)


def emit(value: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=2, allow_nan=False))


def emit_line(value: Any) -> None:
    """Print a result as one line of JSON."""
    print(json.dumps(value, allow_nan=False), flush=True)


def write_json(file: Path, value: Any) -> None:
    """Write a result as JSON: all of it, or the file stays as it was."""
    write_text(file, json.dumps(value, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file: all of it, or the file stays as it was."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file: all of it, or it stays as it was. Its folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print a table; the columns named in `right` are aligned right."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(made)


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields a function of (done, total)."""
    bar = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=remarks(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Progress through named stages; yields a function of (stage, done, total)."""
    bar = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=remarks(),
        disable=not sys.stderr.isatty(),
    )
    tasks: dict[str, Any] = {}
    with bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report
