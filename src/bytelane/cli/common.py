"""What the commands that run a model share: loading it as the options ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast, get_args

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from bytelane.cache import KVCacheChoice
from bytelane.cli.options import RunOptions
from bytelane.cli.output import progress
from bytelane.decoder import FloatOps
from bytelane.generation import load_tokenizer
from bytelane.kernels import gpu
from bytelane.models import load_config, load_model, resolve_checkpoint
from bytelane.quantize.text import Split
from bytelane.scheme import Numerics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quiet() -> None:
    """Leave the terminal to this program: no progress bars or advice from transformers."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def parse_dtype(name: str | None) -> torch.dtype | None:
    """A `--dtype` as a torch dtype."""
    if name is None:
        return None
    if name not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, found {name}", param_hint="--dtype")
    return DTYPES[name]


def check_choice(option: str, name: str, choices: Sequence[str]) -> str:
    """An option's value, refused if it is none of its choices."""
    if name not in choices:
        raise typer.BadParameter(f"must be {', '.join(choices[:-1])} or {choices[-1]}, found {name}", param_hint=option)
    return name


def check_device(name: str) -> str:
    """A `--device`, refused if torch does not know it or has none here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"torch knows no device called {name}", param_hint="--device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise typer.BadParameter(f"torch {torch.__version__} sees {count} CUDA devices here", param_hint="--device")
    return name


def check_split(name: str) -> Split:
    """A `--split`, refused if it is none of the three."""
    return cast(Split, check_choice("--split", name, get_args(Split)))


def source_folder(source: str) -> Path:
    """A float model's place: a folder or GGUF file as it is, or a hub id fetched."""
    path = Path(source).expanduser()
    return path if path.exists() else resolve_checkpoint(source)


def set_threads(threads: int | None) -> None:
    """Apply `--threads`."""
    if threads is not None:
        torch.set_num_threads(threads)


def load(model: str, options: RunOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """A model, its tokenizer and its folder, with a progress bar. Commands read text only, so towers are left out."""
    quiet()
    set_threads(options.threads)
    numerics = check_choice("--numerics", options.numerics, [n.value for n in Numerics])
    kv_cache = cast(KVCacheChoice, check_choice("--kv-cache", options.kv_cache, get_args(KVCacheChoice)))
    float_ops = cast(FloatOps, check_choice("--float-ops", options.float_ops, get_args(FloatOps)))
    dtype = parse_dtype(options.dtype)
    device = check_device(options.device)
    directory = resolve_checkpoint(model)
    load_config(directory, trust_remote_code=options.trust_remote_code)  # the tokenizer reads it too, and blames itself
    tokenizer = load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
    with progress("loading") as report:
        loaded = load_model(
            directory,
            text_only=True,
            device=device,
            dtype=dtype,
            numerics=numerics,
            kv_cache=kv_cache,
            float_ops=float_ops,
            overrides=options.overrides,
            trust_remote_code=options.trust_remote_code,
            progress=report,
        )
    return loaded, tokenizer, directory


def prepare(model: PreTrainedModel, rows: Iterable[int] | None = None) -> None:
    """Compile the kernels a model on a CUDA device needs, side by side and with a progress bar; elsewhere nothing.

    Args:
        model: as `load` returns it.
        rows: numbers of tokens it will be given at once; any up to a piece of a prompt by default.
    """
    if not gpu.runs_on(model.device):
        return
    from bytelane.kernels.compile_ahead import ROWS, compile_ahead

    with progress("compiling kernels") as report:
        compile_ahead(model, rows=ROWS if rows is None else rows, progress=report)
